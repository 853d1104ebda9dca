// The few functions of the CUDA driver that the plugins call, as a table, so that a test can record what a GPU would be told.
#ifndef ISTHMUS_DRIVER_H
#define ISTHMUS_DRIVER_H

#include <cstddef>
#include <cstdint>
#include <string>

extern "C" {

// Each member is the driver function named beside it, with its C types (handles are pointers, CUdeviceptr is 64 bits, CUresult is int).
struct IsthmusDriver {
  int (*context)(void** context);                                                                 // cuCtxGetCurrent
  int (*device)(int* device);                                                                     // cuCtxGetDevice
  int (*device_attribute)(int* value, int attribute, int device);                                 // cuDeviceGetAttribute
  int (*load)(void** module, const void* image);                                                  // cuModuleLoadData
  int (*unload)(void* module);                                                                    // cuModuleUnload
  int (*function)(void** function, void* module, const char* name);                               // cuModuleGetFunction
  int (*function_attribute)(void* function, int attribute, int value);                            // cuFuncSetAttribute
  int (*fill)(std::uint64_t address, unsigned char value, std::size_t bytes, void* stream);       // cuMemsetD8Async
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,                // cuLaunchKernel
                unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra);
  int (*error)(int result, const char** text);                                                    // cuGetErrorString
};

// Replaces the driver in this process, until it is called with null. The table must outlive its use.
void isthmus_trt_set_driver(const IsthmusDriver* driver);
}

namespace isthmus {

// The driver in use. The first call opens libcuda.so.1; where that fails, `reason` says why and the result is null.
const IsthmusDriver* driver(std::string& reason);

// What the driver says about a result.
std::string describe(const IsthmusDriver& driver, const char* call, int result);

}  // namespace isthmus

#endif
