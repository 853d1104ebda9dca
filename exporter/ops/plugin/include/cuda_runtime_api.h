// TensorRT's headers include the CUDA runtime's for the two names below and nothing else. With them declared here the plugin library needs
// no CUDA toolkit to be built, and it links against none: it calls the driver, which it opens at run time.
#ifndef ISTHMUS_CUDA_RUNTIME_API_H
#define ISTHMUS_CUDA_RUNTIME_API_H

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

#endif
