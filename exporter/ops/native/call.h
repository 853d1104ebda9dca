// A call of an operator, as its kernels see it: tensors, sizes and attributes by the names of the schema, scratch memory, and threads.
//
// Kernels are compiled several times with different instruction sets, and the linker keeps one copy of every inline function that is not
// inlined, whichever set it was compiled for. So nothing here, and nothing that a kernel includes, is an inline function outside the
// namespace of its instruction set, unless it is always inlined; a test looks for such symbols.
#pragma once

#include <stddef.h>
#include <stdint.h>

// The build has several instruction sets, unless it is one for a sanitizer.
#if defined(__x86_64__) && !defined(ISTHMUS_ONE_LEVEL)
#define ISTHMUS_X86_LEVELS 1
#else
#define ISTHMUS_X86_LEVELS 0
#endif

#define ISTHMUS_INLINE inline __attribute__((always_inline))

extern "C" {

// The numbers are those of ONNX's TensorProto.DataType.
enum { ISTHMUS_FLOAT32 = 1, ISTHMUS_FLOAT16 = 10, ISTHMUS_BFLOAT16 = 16 };

// Contiguous. `data` is null where an optional input is not given.
struct isthmus_tensor {
  void* data;
  int64_t shape[4];
  int32_t rank;
  int32_t dtype;
};

// `text` for strings, `number` for everything else.
struct isthmus_attribute {
  double number;
  const char* text;
};
}

namespace isthmus {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// Runs body(state, i) for every i below count, on threads of the host, of which there are about as many as `threads`.
struct Parallel {
  void (*run)(void* host, size_t count, void (*body)(void* state, size_t i), void* state);
  void* host;
  int64_t threads;
};

struct Arena;

struct Call {
  const isthmus_tensor* inputs;
  const isthmus_tensor* outputs;
  const isthmus_attribute* attributes;
  const int64_t* sizes;
  Parallel parallel;
  Arena* arena;

  template <class T>
  ISTHMUS_INLINE const T* input(int i) const { return static_cast<const T*>(inputs[i].data); }
  template <class T>
  ISTHMUS_INLINE T* output(int i) const { return static_cast<T*>(outputs[i].data); }
  ISTHMUS_INLINE int64_t size(int i) const { return sizes[i]; }
  ISTHMUS_INLINE double number(int i) const { return attributes[i].number; }
};

// `count` floats, aligned for every instruction set, not initialised, until the call ends. Throws when there is no memory.
float* scratch(const Call& call, int64_t count);

// Ends the call with this message.
[[noreturn]] void refuse(const char* message);

template <class Body>
ISTHMUS_INLINE void parallel_for(const Call& call, int64_t count, const Body& body) {
  struct Thunk {
    static void run(void* state, size_t i) { (*static_cast<const Body*>(state))(static_cast<int64_t>(i)); }
  };
  call.parallel.run(call.parallel.host, static_cast<size_t>(count), &Thunk::run, const_cast<Body*>(&body));
}

}  // namespace isthmus
