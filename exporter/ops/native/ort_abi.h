// The part of ONNX Runtime's C interface that a custom-op library uses, declared by hand from its documented binary layout
// (onnxruntime_c_api.h, https://onnxruntime.ai/docs/api/c/): OrtApi is a table of functions that only ever grows at its end, so that an entry
// is told by its number; OrtCustomOp is a table that we fill, and whose `version` says how far it reaches. A test compares the numbers and
// offsets with the real header where that is installed.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace isthmus::ort {

constexpr uint32_t API_VERSION = 18;  // the first with KernelContext_ParallelFor

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct Value;
struct TensorInfo;
struct OpAttribute;

struct ApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// ISTHMUS_ORT(number in OrtApi, name, result, arguments)
#define ISTHMUS_ORT_FUNCTIONS(ISTHMUS_ORT)                                                                                        \
  ISTHMUS_ORT(0, CreateStatus, Status*, (int code, const char* message))                                                         \
  ISTHMUS_ORT(2, GetErrorMessage, const char*, (const Status*))                                                                  \
  ISTHMUS_ORT(26, CreateCustomOpDomain, Status*, (const char* domain, CustomOpDomain** out))                                     \
  ISTHMUS_ORT(27, CustomOpDomain_Add, Status*, (CustomOpDomain*, const struct CustomOp*))                                        \
  ISTHMUS_ORT(28, AddCustomOpDomain, Status*, (SessionOptions*, CustomOpDomain*))                                                \
  ISTHMUS_ORT(51, GetTensorMutableData, Status*, (Value*, void** out))                                                           \
  ISTHMUS_ORT(57, CreateTensorTypeAndShapeInfo, Status*, (TensorInfo** out))                                                     \
  ISTHMUS_ORT(58, SetTensorElementType, Status*, (TensorInfo*, int type))                                                        \
  ISTHMUS_ORT(59, SetDimensions, Status*, (TensorInfo*, const int64_t* values, size_t count))                                    \
  ISTHMUS_ORT(60, GetTensorElementType, Status*, (const TensorInfo*, int* out))                                                  \
  ISTHMUS_ORT(61, GetDimensionsCount, Status*, (const TensorInfo*, size_t* out))                                                 \
  ISTHMUS_ORT(62, GetDimensions, Status*, (const TensorInfo*, int64_t* values, size_t count))                                    \
  ISTHMUS_ORT(63, GetSymbolicDimensions, Status*, (const TensorInfo*, const char** names, size_t count))                         \
  ISTHMUS_ORT(65, GetTensorTypeAndShape, Status*, (const Value*, TensorInfo** out))                                              \
  ISTHMUS_ORT(85, KernelInfoGetAttribute_float, Status*, (const KernelInfo*, const char* name, float* out))                      \
  ISTHMUS_ORT(86, KernelInfoGetAttribute_int64, Status*, (const KernelInfo*, const char* name, int64_t* out))                    \
  ISTHMUS_ORT(90, KernelContext_GetInput, Status*, (const KernelContext*, size_t index, const Value** out))                      \
  ISTHMUS_ORT(91, KernelContext_GetOutput, Status*, (KernelContext*, size_t index, const int64_t*, size_t count, Value** out))   \
  ISTHMUS_ORT(93, ReleaseStatus, void, (Status*))                                                                                \
  ISTHMUS_ORT(99, ReleaseTensorTypeAndShapeInfo, void, (TensorInfo*))                                                            \
  ISTHMUS_ORT(268, ShapeInferContext_GetInputTypeShape, Status*, (const ShapeInferContext*, size_t index, TensorInfo** out))     \
  ISTHMUS_ORT(269, ShapeInferContext_GetAttribute, Status*, (const ShapeInferContext*, const char*, const OpAttribute** out))    \
  ISTHMUS_ORT(270, ShapeInferContext_SetOutputTypeShape, Status*, (const ShapeInferContext*, size_t index, const TensorInfo*))   \
  ISTHMUS_ORT(271, SetSymbolicDimensions, Status*, (TensorInfo*, const char** names, size_t count))                              \
  ISTHMUS_ORT(272, ReadOpAttr, Status*, (const OpAttribute*, int type, void* data, size_t bytes, size_t* out))                   \
  ISTHMUS_ORT(274, KernelContext_ParallelFor, Status*,                                                                           \
              (const KernelContext*, void (*body)(void*, size_t), size_t total, size_t batches, void* state))

#define ISTHMUS_ORT_INDEX(number, name, result, arguments) constexpr size_t INDEX_##name = number;
ISTHMUS_ORT_FUNCTIONS(ISTHMUS_ORT_INDEX)
#undef ISTHMUS_ORT_INDEX

// The functions of a run time's table.
struct Api {
#define ISTHMUS_ORT_MEMBER(number, name, result, arguments) result(*name) arguments;
  ISTHMUS_ORT_FUNCTIONS(ISTHMUS_ORT_MEMBER)
#undef ISTHMUS_ORT_MEMBER

  explicit Api(const void* const* table) {
#define ISTHMUS_ORT_READ(number, name, result, arguments) \
  name = reinterpret_cast<result(*) arguments>(const_cast<void*>(table[number]));
    ISTHMUS_ORT_FUNCTIONS(ISTHMUS_ORT_READ)
#undef ISTHMUS_ORT_READ
  }
};

constexpr int STATUS_FAIL = 1, STATUS_INVALID_ARGUMENT = 2;
constexpr int ATTRIBUTE_INT = 1, ATTRIBUTE_FLOAT = 3;
constexpr int REQUIRED = 0;
constexpr int DEFAULT_MEMORY = 0;

// Entries of version 18. We do not fill those that only variadic inputs and old run times use.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void* const* api, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  int (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const void* const* api, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** input_index, int** output_index);
  void (*ReleaseMayInplace)(int* input_index, int* output_index);
  size_t (*GetAliasMap)(int** input_index, int** output_index);
  void (*ReleaseAliasMap)(int* input_index, int* output_index);
};

}  // namespace isthmus::ort
