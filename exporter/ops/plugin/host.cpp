// Stands in for TensorRT: takes the creators out of a plugin library as TensorRT does, and calls their plugins in TensorRT's order, behind C
// functions. Nothing of TensorRT's libraries is needed, and no GPU: the plugin's driver is replaced.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;

namespace {

class Expression;

class ExpressionImpl final : public nvinfer1::apiv::VDimensionExpr {
 public:
  // Sizes are unknown to the plugin, as in a network of dynamic shapes, unless they are numbers of its own.
  ExpressionImpl(std::int64_t value, bool constant) : value(value), constant(constant) {}
  bool isConstant() const override { return constant; }
  std::int64_t getConstantValue() const override { return constant ? value : INT64_MIN; }
  bool isSizeTensor() const override { return false; }

  const std::int64_t value;
  const bool constant;
};

class Expression final : public nvinfer1::IDimensionExpr {
 public:
  Expression(std::int64_t value, bool constant) : impl_(value, constant) { mImpl = &impl_; }
  std::int64_t value() const { return impl_.value; }
  bool constant() const { return impl_.constant; }

 private:
  ExpressionImpl impl_;
};

class BuilderImpl final : public nvinfer1::apiv::VExprBuilder {
 public:
  const nvinfer1::IDimensionExpr* add(std::int64_t value, bool constant) {
    expressions_.push_back(std::make_unique<Expression>(value, constant));
    return expressions_.back().get();
  }
  const nvinfer1::IDimensionExpr* constant(std::int64_t value) override { return add(value, true); }
  const nvinfer1::IDimensionExpr* operation(DimensionOperation what, const nvinfer1::IDimensionExpr& first,
                                            const nvinfer1::IDimensionExpr& second) override {
    const auto& one = static_cast<const Expression&>(first);
    const auto& two = static_cast<const Expression&>(second);
    const std::int64_t a = one.value();
    const std::int64_t b = two.value();
    const bool constant = one.constant() && two.constant();
    switch (what) {
      case DimensionOperation::kSUM:
        return add(a + b, constant);
      case DimensionOperation::kPROD:
        return add(a * b, constant);
      case DimensionOperation::kSUB:
        return add(a - b, constant);
      case DimensionOperation::kFLOOR_DIV:
        return b == 0 ? nullptr : add(a / b, constant);
      default:
        return nullptr;
    }
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(std::int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Expression>> expressions_;
};

class Builder final : public nvinfer1::IExprBuilder {
 public:
  Builder() { mImpl = &impl; }
  BuilderImpl impl;
};

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity, const nvinfer1::AsciiChar* message) noexcept override { messages += std::string(message) + "\n"; }
  std::string messages;
};

class Finder final : public nvinfer1::ILoggerFinder {
 public:
  nvinfer1::ILogger* findLogger() override { return &logger; }
  Logger logger;
};

Finder finder;

nvinfer1::Dims dims_of(const std::int64_t* sizes, std::int32_t rank) {
  nvinfer1::Dims dims{};
  dims.nbDims = rank;
  for (std::int32_t i = 0; i < rank; ++i) dims.d[i] = sizes[i];
  return dims;
}

template <class Capability>
Capability* capability(nvinfer1::IPluginV3* plugin, nvinfer1::PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

nvinfer1::IPluginV3OneBuild* build_of(nvinfer1::IPluginV3* plugin) {
  return capability<nvinfer1::IPluginV3OneBuild>(plugin, nvinfer1::PluginCapabilityType::kBUILD);
}

nvinfer1::IPluginV3OneRuntime* runtime_of(nvinfer1::IPluginV3* plugin) {
  return capability<nvinfer1::IPluginV3OneRuntime>(plugin, nvinfer1::PluginCapabilityType::kRUNTIME);
}

}  // namespace

#define ISTHMUS_EXPORT extern "C" __attribute__((visibility("default")))

// A tensor; `sizes` are the actual ones, `least` and `most` the ends of the range that it was built for.
struct IsthmusTensor {
  std::int32_t type;  // nvinfer1::DataType
  std::int32_t rank;
  std::int64_t sizes[8];
  std::int64_t least[8];
  std::int64_t most[8];
  void* address;
};

namespace {

nvinfer1::PluginTensorDesc describe(const IsthmusTensor& tensor) {
  return {dims_of(tensor.sizes, tensor.rank), static_cast<DataType>(tensor.type), nvinfer1::TensorFormat::kLINEAR, 0.0F};
}

// At build time the sizes that are not fixed read -1.
nvinfer1::DynamicPluginTensorDesc describe_range(const IsthmusTensor& tensor) {
  nvinfer1::DynamicPluginTensorDesc range{describe(tensor), dims_of(tensor.least, tensor.rank), dims_of(tensor.most, tensor.rank),
                                          dims_of(tensor.sizes, tensor.rank)};
  for (std::int32_t i = 0; i < tensor.rank; ++i) {
    if (tensor.least[i] != tensor.most[i]) range.desc.dims.d[i] = -1;
  }
  return range;
}

template <class Result, class Function>
std::vector<Result> each(const IsthmusTensor* tensors, std::int32_t count, Function&& function) {
  std::vector<Result> result;
  for (std::int32_t i = 0; i < count; ++i) result.push_back(function(tensors[i]));
  return result;
}

}  // namespace

// What was logged since the last call.
ISTHMUS_EXPORT const char* isthmus_host_messages() {
  static std::string messages;
  messages = finder.logger.messages;
  finder.logger.messages.clear();
  return messages.c_str();
}

// The plugin library's handle for the other functions; null when it is not one.
ISTHMUS_EXPORT void* isthmus_host_open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    finder.logger.messages += dlerror();
    return nullptr;
  }
  using SetFinder = void (*)(nvinfer1::ILoggerFinder*);
  if (auto* set = reinterpret_cast<SetFinder>(dlsym(library, "setLoggerFinder"))) set(&finder);
  return library;
}

// The creator at an index; null past the last.
ISTHMUS_EXPORT void* isthmus_host_creator(void* library, std::int32_t index) {
  using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(std::int32_t&);
  auto* get = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  if (get == nullptr) return nullptr;
  std::int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = get(count);
  return index < count ? static_cast<nvinfer1::IPluginCreatorV3One*>(creators[index]) : nullptr;
}

ISTHMUS_EXPORT const char* isthmus_host_creator_name(void* creator) {
  return static_cast<nvinfer1::IPluginCreatorV3One*>(creator)->getPluginName();
}

ISTHMUS_EXPORT const nvinfer1::PluginFieldCollection* isthmus_host_creator_fields(void* creator) {
  return static_cast<nvinfer1::IPluginCreatorV3One*>(creator)->getFieldNames();
}

// A plugin of a node; null when the creator refuses its attributes.
ISTHMUS_EXPORT void* isthmus_host_create(void* creator, const char* name, const nvinfer1::PluginFieldCollection* fields, std::int32_t phase) {
  return static_cast<nvinfer1::IPluginCreatorV3One*>(creator)->createPlugin(name, fields, static_cast<nvinfer1::TensorRTPhase>(phase));
}

ISTHMUS_EXPORT const nvinfer1::PluginFieldCollection* isthmus_host_fields(void* plugin) {
  return runtime_of(static_cast<nvinfer1::IPluginV3*>(plugin))->getFieldsToSerialize();
}

ISTHMUS_EXPORT void isthmus_host_destroy(void* plugin) { delete static_cast<nvinfer1::IPluginV3*>(plugin); }

ISTHMUS_EXPORT std::int32_t isthmus_host_output_count(void* plugin) {
  return build_of(static_cast<nvinfer1::IPluginV3*>(plugin))->getNbOutputs();
}

// Fills in type, rank and sizes of the outputs. The inputs' sizes reach the plugin as symbols.
ISTHMUS_EXPORT std::int32_t isthmus_host_infer(void* handle, const IsthmusTensor* inputs, std::int32_t input_count, IsthmusTensor* outputs,
                                               std::int32_t output_count) {
  nvinfer1::IPluginV3OneBuild* plugin = build_of(static_cast<nvinfer1::IPluginV3*>(handle));
  const auto types = each<DataType>(inputs, input_count, [](const IsthmusTensor& t) { return static_cast<DataType>(t.type); });
  std::vector<DataType> output_types(static_cast<std::size_t>(output_count));
  if (std::int32_t status = plugin->getOutputDataTypes(output_types.data(), output_count, types.data(), input_count); status != 0) return status;
  Builder builder;
  const auto shapes = each<nvinfer1::DimsExprs>(inputs, input_count, [&](const IsthmusTensor& t) {
    nvinfer1::DimsExprs dims{};
    dims.nbDims = t.rank;
    for (std::int32_t i = 0; i < t.rank; ++i) dims.d[i] = builder.impl.add(t.sizes[i], false);
    return dims;
  });
  std::vector<nvinfer1::DimsExprs> output_shapes(static_cast<std::size_t>(output_count));
  if (std::int32_t status =
          plugin->getOutputShapes(shapes.data(), input_count, nullptr, 0, output_shapes.data(), output_count, builder);
      status != 0) {
    return status;
  }
  for (std::int32_t i = 0; i < output_count; ++i) {
    const nvinfer1::DimsExprs& shape = output_shapes[static_cast<std::size_t>(i)];
    outputs[i].type = static_cast<std::int32_t>(output_types[static_cast<std::size_t>(i)]);
    outputs[i].rank = shape.nbDims;
    for (std::int32_t axis = 0; axis < shape.nbDims; ++axis) outputs[i].sizes[axis] = static_cast<const Expression*>(shape.d[axis])->value();
  }
  return 0;
}

// Whether the plugin takes these types in the linear format (and in no other): 1 or 0.
ISTHMUS_EXPORT std::int32_t isthmus_host_supports(void* handle, const IsthmusTensor* tensors, std::int32_t input_count,
                                                  std::int32_t output_count, std::int32_t format) {
  nvinfer1::IPluginV3OneBuild* plugin = build_of(static_cast<nvinfer1::IPluginV3*>(handle));
  auto ranges = each<nvinfer1::DynamicPluginTensorDesc>(tensors, input_count + output_count, describe_range);
  for (auto& range : ranges) range.desc.format = static_cast<nvinfer1::TensorFormat>(format);
  for (std::int32_t i = 0; i < input_count + output_count; ++i) {
    if (!plugin->supportsFormatCombination(i, ranges.data(), input_count, output_count)) return 0;
  }
  return 1;
}

// Configures the plugin for the ranges of its tensors, and asks for the bytes of its workspace.
ISTHMUS_EXPORT std::int32_t isthmus_host_configure(void* handle, const IsthmusTensor* tensors, std::int32_t input_count,
                                                   std::int32_t output_count, std::uint64_t* workspace) {
  nvinfer1::IPluginV3OneBuild* plugin = build_of(static_cast<nvinfer1::IPluginV3*>(handle));
  const auto ranges = each<nvinfer1::DynamicPluginTensorDesc>(tensors, input_count + output_count, describe_range);
  const nvinfer1::DynamicPluginTensorDesc* outputs = ranges.data() + input_count;
  if (std::int32_t status = plugin->configurePlugin(ranges.data(), input_count, outputs, output_count); status != 0) return status;
  *workspace = plugin->getWorkspaceSize(ranges.data(), input_count, outputs, output_count);
  return 0;
}

// A plugin for an execution context.
ISTHMUS_EXPORT void* isthmus_host_attach(void* plugin) { return runtime_of(static_cast<nvinfer1::IPluginV3*>(plugin))->attachToContext(nullptr); }

ISTHMUS_EXPORT std::int32_t isthmus_host_shapes(void* plugin, const IsthmusTensor* tensors, std::int32_t input_count,
                                                std::int32_t output_count) {
  const auto all = each<nvinfer1::PluginTensorDesc>(tensors, input_count + output_count, describe);
  return runtime_of(static_cast<nvinfer1::IPluginV3*>(plugin))->onShapeChange(all.data(), input_count, all.data() + input_count, output_count);
}

ISTHMUS_EXPORT std::int32_t isthmus_host_enqueue(void* plugin, const IsthmusTensor* tensors, std::int32_t input_count,
                                                 std::int32_t output_count, void* workspace, void* stream) {
  const auto all = each<nvinfer1::PluginTensorDesc>(tensors, input_count + output_count, describe);
  const auto addresses = each<void*>(tensors, input_count + output_count, [](const IsthmusTensor& t) { return t.address; });
  return runtime_of(static_cast<nvinfer1::IPluginV3*>(plugin))
      ->enqueue(all.data(), all.data() + input_count, addresses.data(), addresses.data() + input_count, workspace,
                static_cast<cudaStream_t>(stream));
}
