// The operators as custom ops of ONNX Runtime: domain `isthmus`, version 1, one op for each form and dtype.
#include <stdio.h>

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "operators.h"
#include "ort_abi.h"

namespace isthmus::ort {
namespace {

const Api* api = nullptr;  // set once, by the first RegisterCustomOps

Status* failed(const std::string& message) { return api->CreateStatus(STATUS_INVALID_ARGUMENT, message.c_str()); }

// A status of the run time's, as an exception of ours.
void check(Status* status) {
  if (!status) return;
  Refusal refusal{api->GetErrorMessage(status)};
  api->ReleaseStatus(status);
  throw refusal;
}

// No exception may leave through the C interface.
template <class Body>
Status* guarded(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Refusal& refusal) {
    return failed(refusal.message);
  } catch (const std::exception& error) {
    return failed(error.what());
  }
}

struct Node : CustomOp {
  const Operator* op;
  const Form* form;
  int dtype;

  int type(const Argument& a) const { return a.wide ? static_cast<int>(ISTHMUS_FLOAT32) : dtype; }
  const Argument& input(size_t i) const { return op->inputs[static_cast<size_t>(form->inputs[i])]; }
  const Fixed* fixed(size_t attribute) const {
    for (const Fixed& f : form->fixed)
      if (static_cast<size_t>(f.attribute) == attribute) return &f;
    return nullptr;
  }
};

const Node& node(const CustomOp* op) { return *static_cast<const Node*>(op); }

// The attributes that the form stands for; the others come from `read(name, type)`.
template <class Read>
std::vector<isthmus_attribute> attributes(const Node& node, const Read& read) {
  std::vector<isthmus_attribute> all;
  for (size_t i = 0; i < node.op->attributes.size(); ++i) {
    const Attribute& a = node.op->attributes[i];
    if (const Fixed* f = node.fixed(i)) {
      all.push_back({f->number, f->text});
    } else {
      all.push_back({read(a), nullptr});
    }
  }
  return all;
}

struct OrtKernel {
  const Node* node;
  std::vector<isthmus_attribute> attributes;
};

Status* create(const CustomOp* op, const void* const*, const KernelInfo* info, void** kernel) {
  return guarded([&] {
    const auto read = [&](const Attribute& a) -> double {
      if (a.type == 'f') {
        float value = 0;
        check(api->KernelInfoGetAttribute_float(info, a.name, &value));
        return value;
      }
      int64_t value = 0;
      check(api->KernelInfoGetAttribute_int64(info, a.name, &value));
      return static_cast<double>(value);
    };
    *kernel = new OrtKernel{&node(op), attributes(node(op), read)};
  });
}

struct InfoRelease {
  void operator()(TensorInfo* info) const { api->ReleaseTensorTypeAndShapeInfo(info); }
};

void read_shape(const TensorInfo* info, const Argument& a, isthmus_tensor& tensor) {
  int type = 0;
  size_t rank = 0;
  check(api->GetTensorElementType(info, &type));
  check(api->GetDimensionsCount(info, &rank));
  if (rank > 4) throw Refusal{std::string(a.name) + " has " + std::to_string(rank) + " axes, expected " + std::to_string(a.rank)};
  tensor.dtype = type;
  tensor.rank = static_cast<int32_t>(rank);
  check(api->GetDimensions(info, tensor.shape, rank));
}

void run_in_session(void* host, size_t count, void (*body)(void*, size_t), void* state) {
  if (count == 0) return;
  check(api->KernelContext_ParallelFor(static_cast<const KernelContext*>(host), body, count, 0, state));
}

Status* compute(void* kernel, KernelContext* context) {
  return guarded([&] {
    const OrtKernel& k = *static_cast<OrtKernel*>(kernel);
    const Operator& op = *k.node->op;
    std::vector<isthmus_tensor> inputs(op.inputs.size()), outputs(op.outputs.size());
    for (isthmus_tensor& tensor : inputs) tensor.rank = -1;
    for (size_t i = 0; i < k.node->form->inputs.size(); ++i) {
      isthmus_tensor& tensor = inputs[static_cast<size_t>(k.node->form->inputs[i])];
      const Value* value = nullptr;
      check(api->KernelContext_GetInput(context, i, &value));
      if (!value) throw Refusal{std::string(op.name) + ": " + k.node->input(i).name + " is missing"};
      TensorInfo* info = nullptr;
      check(api->GetTensorTypeAndShape(value, &info));
      const std::unique_ptr<TensorInfo, InfoRelease> owner(info);
      read_shape(info, k.node->input(i), tensor);
      check(api->GetTensorMutableData(const_cast<Value*>(value), &tensor.data));
    }
    const std::vector<int64_t> sizes = infer_sizes(op, inputs.data(), k.attributes.data());
    for (size_t i = 0; i < outputs.size(); ++i) {
      const std::vector<int64_t> shape = bounded_shape(op, op.outputs[i], sizes);
      Value* value = nullptr;
      check(api->KernelContext_GetOutput(context, i, shape.data(), shape.size(), &value));
      outputs[i].dtype = k.node->type(op.outputs[i]);
      outputs[i].rank = static_cast<int32_t>(shape.size());
      for (size_t axis = 0; axis < shape.size(); ++axis) outputs[i].shape[axis] = shape[axis];
      check(api->GetTensorMutableData(value, &outputs[i].data));
    }
    // The session's pool does not tell its size; that of the machine is its default.
    static const int64_t threads = std::max(1u, std::thread::hardware_concurrency());
    execute(op, inputs.data(), outputs.data(), k.attributes.data(), sizes, Parallel{run_in_session, context, threads});
  });
}

Status* infer(const CustomOp* self, ShapeInferContext* context) {
  return guarded([&] {
    const Node& n = node(self);
    const Operator& op = *n.op;
    std::vector<isthmus_tensor> inputs(op.inputs.size());
    for (isthmus_tensor& tensor : inputs) tensor.rank = -1;
    // A symbol stands for a size when an axis that is that size alone bears it.
    std::vector<std::string> symbols(op.sizes.size());
    for (size_t i = 0; i < n.form->inputs.size(); ++i) {
      const Argument& a = n.input(i);
      isthmus_tensor& tensor = inputs[static_cast<size_t>(n.form->inputs[i])];
      TensorInfo* info = nullptr;  // the context's
      check(api->ShapeInferContext_GetInputTypeShape(context, i, &info));
      read_shape(info, a, tensor);
      // The run time gives no axes for a scalar and for a tensor of unknown rank alike; the kernel looks again.
      if (tensor.rank == 0) return;
      const char* names[4] = {};
      check(api->GetSymbolicDimensions(info, names, static_cast<size_t>(tensor.rank)));
      for (int axis = 0; axis < tensor.rank && axis < a.rank; ++axis) {
        const Dimension& dim = a.shape[axis];
        if (tensor.shape[axis] == UNKNOWN && names[axis] && dim.count == 1 && !dim.less) symbols[dim.factors[0]] = names[axis];
      }
    }
    const auto read = [&](const Attribute& a) -> double {
      const OpAttribute* attribute = nullptr;
      check(api->ShapeInferContext_GetAttribute(context, a.name, &attribute));
      size_t size = 0;
      if (a.type == 'f') {
        float value = 0;
        check(api->ReadOpAttr(attribute, ATTRIBUTE_FLOAT, &value, sizeof(value), &size));
        return value;
      }
      int64_t value = 0;
      check(api->ReadOpAttr(attribute, ATTRIBUTE_INT, &value, sizeof(value), &size));
      return static_cast<double>(value);
    };
    const std::vector<isthmus_attribute> all = attributes(n, read);
    const std::vector<int64_t> sizes = infer_sizes(op, inputs.data(), all.data());
    for (size_t i = 0; i < op.outputs.size(); ++i) {
      const Argument& a = op.outputs[i];
      const std::vector<int64_t> shape = output_shape(a, sizes);
      std::vector<const char*> names;
      for (int axis = 0; axis < a.rank; ++axis) {
        const Dimension& dim = a.shape[axis];
        const bool known = shape[static_cast<size_t>(axis)] != UNKNOWN;
        names.push_back(!known && dim.count == 1 && !dim.less ? symbols[dim.factors[0]].c_str() : "");
      }
      TensorInfo* info = nullptr;
      check(api->CreateTensorTypeAndShapeInfo(&info));
      const std::unique_ptr<TensorInfo, InfoRelease> owner(info);
      // The run time asks the op of one dtype for the shapes of all: the dtype is the input's, not that op's.
      check(api->SetTensorElementType(info, a.wide ? static_cast<int>(ISTHMUS_FLOAT32) : inputs[0].dtype));
      check(api->SetDimensions(info, shape.data(), shape.size()));
      check(api->SetSymbolicDimensions(info, names.data(), names.size()));
      check(api->ShapeInferContext_SetOutputTypeShape(context, i, info));
    }
  });
}

Node make(const Operator& op, const Form& form, int dtype) {
  Node n = {};
  n.op = &op;
  n.form = &form;
  n.dtype = dtype;
  n.version = API_VERSION;
  n.GetName = [](const CustomOp* self) { return node(self).form->op_type; };
  n.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
  n.GetInputType = [](const CustomOp* self, size_t i) { return node(self).type(node(self).input(i)); };
  n.GetInputTypeCount = [](const CustomOp* self) { return node(self).form->inputs.size(); };
  n.GetOutputType = [](const CustomOp* self, size_t i) { return node(self).type(node(self).op->outputs[i]); };
  n.GetOutputTypeCount = [](const CustomOp* self) { return node(self).op->outputs.size(); };
  n.GetInputCharacteristic = n.GetOutputCharacteristic = [](const CustomOp*, size_t) { return REQUIRED; };
  n.GetInputMemoryType = [](const CustomOp*, size_t) { return DEFAULT_MEMORY; };
  n.CreateKernelV2 = create;
  n.KernelComputeV2 = compute;
  n.KernelDestroy = [](void* kernel) { delete static_cast<OrtKernel*>(kernel); };
  n.InferOutputShapeFn = infer;
  n.GetStartVersion = [](const CustomOp*) { return 1; };
  n.GetEndVersion = [](const CustomOp*) { return 1; };
  return n;
}

// The domain lives as long as the process: sessions keep pointers into it.
CustomOpDomain* domain() {
  static CustomOpDomain* const made = [] {
    static std::vector<std::unique_ptr<Node>> nodes;
    CustomOpDomain* result = nullptr;
    check(api->CreateCustomOpDomain("isthmus", &result));
    for (const Operator& op : operators()) {
      for (const Form& form : op.forms) {
        for (const int dtype : {ISTHMUS_FLOAT32, ISTHMUS_FLOAT16, ISTHMUS_BFLOAT16}) {
          nodes.push_back(std::make_unique<Node>(make(op, form, dtype)));
          check(api->CustomOpDomain_Add(result, nodes.back().get()));
        }
      }
    }
    return result;
  }();
  return made;
}

}  // namespace
}  // namespace isthmus::ort

// What ONNX Runtime calls when the library is registered with a session.
extern "C" __attribute__((visibility("default"))) isthmus::ort::Status* RegisterCustomOps(isthmus::ort::SessionOptions* options,
                                                                                          const isthmus::ort::ApiBase* base) {
  using namespace isthmus::ort;
  const void* const* table = base->GetApi(API_VERSION);
  if (!table) {
    // Without a table there is no way to make a status: a null one would say that all is well.
    fprintf(stderr, "isthmus: this ONNX Runtime (%s) is older than 1.18\n", base->GetVersionString());
    const void* const* first = base->GetApi(1);
    return first ? reinterpret_cast<Status* (*)(int, const char*)>(const_cast<void*>(first[INDEX_CreateStatus]))(
                       STATUS_FAIL, "libisthmus_ops needs ONNX Runtime 1.18 or later")
                 : nullptr;
  }
  static const Api functions(table);
  api = &functions;
  return guarded([&] { check(api->AddCustomOpDomain(options, domain())); });
}
