#include "plugin.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <mutex>
#include <optional>

#include "sizes.h"

namespace isthmus {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

nvinfer1::ILoggerFinder* finder = nullptr;

// TensorRT hands over a finder when it loads the library; it knows a logger only while an engine with plugins inside is in use.
void log(const std::string& message) noexcept {
  nvinfer1::ILogger* logger = finder != nullptr ? finder->findLogger() : nullptr;
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
  } else {
    std::fprintf(stderr, "%s\n", message.c_str());
  }
}

// TensorRT's interfaces let no exception out: what is thrown here, memory aside, is a fault of this library.
template <class Result, class Function>
Result guarded(Result failure, Function&& function) noexcept {
  try {
    return function();
  } catch (const std::exception& error) {
    try {
      log(std::string("isthmus: internal error: ") + error.what());
    } catch (...) {  // no memory for the message
    }
    return failure;
  }
}

std::optional<Element> element_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return Element::float32;
    case DataType::kHALF:
      return Element::float16;
    case DataType::kBF16:
      return Element::bfloat16;
    case DataType::kFP8:
      return Element::float8;
    case DataType::kINT32:
      return Element::int32;
    default:
      return std::nullopt;
  }
}

DataType type_of(Element element) {
  switch (element) {
    case Element::float16:
      return DataType::kHALF;
    case Element::bfloat16:
      return DataType::kBF16;
    case Element::float8:
      return DataType::kFP8;
    case Element::int32:
      return DataType::kINT32;
    default:
      return DataType::kFLOAT;
  }
}

std::string name_of(DataType type) {
  const std::optional<Element> element = element_of(type);
  return element ? isthmus::name_of(*element) : "data type " + std::to_string(static_cast<std::int32_t>(type));
}

// Why a plan does not take inputs of these types; empty when it does.
std::string mismatch(const Plan& plan, const Node& node, const std::vector<DataType>& types) {
  for (std::size_t i = 0; i < node.inputs.size() && i < types.size(); ++i) {
    if (node.inputs[i].empty()) continue;
    const Tensor* tensor = find(plan, node.inputs[i]);
    if (tensor == nullptr) return "has no input " + node.inputs[i];
    if (element_of(types[i]) != tensor->element) {
      return node.inputs[i] + " is " + name_of(types[i]) + ", expected " + isthmus::name_of(tensor->element);
    }
  }
  return "";
}

// What can be done about activations that no kernel of the form takes.
std::string remedy(const std::string& form, DataType type) {
  std::string names;
  for (const Element element : {Element::float32, Element::float16, Element::bfloat16, Element::float8}) {
    bool taken = false;
    for (const Plan& plan : plans()) taken = taken || (plan.form == form && plan.activations == element);
    if (taken) names += (names.empty() ? "" : ", ") + std::string(isthmus::name_of(element));
  }
  const char* how = type == DataType::kFP8 ? "dequantize the inputs before the node (DequantizeLinear)" : "cast the inputs before the node";
  return std::string(how) + ": it takes " + names;
}

// A plan that takes inputs of these types, the sizes aside: it says what the types of the outputs are.
const Plan* plan_of_types(const Node& node, const std::vector<DataType>& types, std::string& reason) {
  const std::optional<Element> activations = element_of(types.at(0));
  for (const Plan& plan : plans()) {
    if (plan.form != node.form || activations != plan.activations) continue;
    reason = mismatch(plan, node, types);
    if (reason.empty()) return &plan;
  }
  if (reason.empty()) {
    reason = node.inputs.at(0) + " is " + name_of(types[0]) + ", which no kernel of " + node.form + " takes; " + remedy(node.form, types[0]);
  }
  return nullptr;
}

struct Symbols {
  nvinfer1::IExprBuilder& builder;
  using Value = const nvinfer1::IDimensionExpr*;
  Value operation(nvinfer1::DimensionOperation what, Value a, Value b) {
    Value result = builder.operation(what, *a, *b);
    if (result == nullptr) throw std::runtime_error("a dimension cannot be computed");
    return result;
  }
  Value number(std::int64_t value) { return builder.constant(value); }
  Value multiply(Value a, Value b) { return operation(nvinfer1::DimensionOperation::kPROD, a, b); }
  Value divide(Value a, Value b) { return operation(nvinfer1::DimensionOperation::kFLOOR_DIV, a, b); }
  Value subtract(Value a, Value b) { return operation(nvinfer1::DimensionOperation::kSUB, a, b); }
};

PluginFieldType field_type(Type type) {
  switch (type) {
    case Type::integer:
      return PluginFieldType::kINT32;
    case Type::real:
      return PluginFieldType::kFLOAT32;
    default:
      return PluginFieldType::kCHAR;
  }
}

// Takes a field's value; what it returns says why it cannot.
std::string take(const PluginField& field, const Attribute& attribute, Fields& fields) {
  const std::string name = attribute.name;
  if (attribute.type == Type::text) {
    if (field.type != PluginFieldType::kCHAR) return name + " is not a text";
    std::string text(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length));
    fields.texts[name] = text.substr(0, text.find('\0'));
    return "";
  }
  if (field.length != 1 || field.data == nullptr) return name + " has " + std::to_string(field.length) + " values, expected 1";
  if (attribute.type == Type::real && field.type == PluginFieldType::kFLOAT32) {
    fields.reals[name] = *static_cast<const float*>(field.data);
    return std::isfinite(fields.reals[name]) ? "" : name + " is not finite";
  }
  if (attribute.type != Type::integer || (field.type != PluginFieldType::kINT32 && field.type != PluginFieldType::kINT64)) {
    return name + " has the field type " + std::to_string(static_cast<std::int32_t>(field.type));
  }
  const bool wide = field.type == PluginFieldType::kINT64;
  const std::int64_t value = wide ? *static_cast<const std::int64_t*>(field.data) : *static_cast<const std::int32_t*>(field.data);
  fields.integers[name] = value;
  const std::int64_t least = attribute.required ? 1 : 0;  // what has no default is a count
  return value >= least ? "" : name + " is " + std::to_string(value) + ", expected at least " + std::to_string(least);
}

std::string take_all(const NodeType& type, const nvinfer1::PluginFieldCollection* given, Fields& fields) {
  for (const Attribute& attribute : type.attributes) {
    const PluginField* found = nullptr;
    for (std::int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
      if (given->fields[i].name == attribute.name) found = &given->fields[i];
    }
    if (found != nullptr) {
      if (std::string reason = take(*found, attribute, fields); !reason.empty()) return reason;
    } else if (attribute.required) {
      return "has no attribute " + attribute.name;
    } else if (attribute.type == Type::integer) {
      fields.integers[attribute.name] = static_cast<std::int64_t>(attribute.number);
    } else if (attribute.type == Type::real) {
      fields.reals[attribute.name] = static_cast<float>(attribute.number);
    } else {
      fields.texts[attribute.name] = attribute.text;
    }
  }
  for (std::int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
    bool known = false;
    for (const Attribute& attribute : type.attributes) known = known || given->fields[i].name == attribute.name;
    if (!known) return std::string("has no attribute ") + given->fields[i].name;
  }
  return "";
}

std::size_t bytes(const Argument& argument, const Plan& plan, const Sizes& sizes) {
  const Tensor* tensor = find(plan, argument.name);
  if (tensor == nullptr) throw std::out_of_range("no tensor " + argument.name);
  std::size_t count = bytes_of(tensor->element);
  for (const std::int64_t size : shape_of(argument, sizes)) count *= static_cast<std::size_t>(size);
  return count;
}

}  // namespace

SerializedFields::SerializedFields(const NodeType& type, const Fields& fields) {
  for (const Attribute& attribute : type.attributes) {
    if (attribute.type == Type::integer) {
      integers_.push_back(fields.integers.at(attribute.name));
      fields_.emplace_back(attribute.name.c_str(), &integers_.back(), PluginFieldType::kINT64, 1);
    } else if (attribute.type == Type::real) {
      reals_.push_back(fields.reals.at(attribute.name));
      fields_.emplace_back(attribute.name.c_str(), &reals_.back(), PluginFieldType::kFLOAT32, 1);
    } else {
      const std::string& text = fields.texts.at(attribute.name);
      fields_.emplace_back(attribute.name.c_str(), text.c_str(), PluginFieldType::kCHAR, static_cast<std::int32_t>(text.size()));
    }
  }
  collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
}

Plugin::Plugin(const Operator& op, const NodeType& type, Fields fields, std::string layer)
    : op_(op), type_(type), fields_(std::move(fields)), layer_(std::move(layer)), serialized_(type_, fields_), cache_id_(type_.name) {
  for (const auto& item : fields_.integers) cache_id_ += "|" + item.first + "=" + std::to_string(item.second);
  for (const auto& item : fields_.reals) cache_id_ += "|" + item.first + "=" + std::to_string(item.second);
  for (const auto& item : fields_.texts) cache_id_ += "|" + item.first + "=" + item.second;
}

std::int32_t Plugin::fail(Status status, const std::string& what) const {
  log("isthmus: " + type_.name + (layer_.empty() ? "" : " \"" + layer_ + "\"") + ": " + what);
  return status;
}

std::string Plugin::read(std::size_t inputs, Node& node) const {
  std::string reason = type_.read(type_, fields_, inputs, node);
  for (const std::string& name : node.inputs) {
    if (!name.empty()) find(op_.inputs, name);
  }
  return reason;
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(nullptr, [&] { return new Plugin(op_, type_, fields_, layer_); });
}

std::int32_t Plugin::getOutputDataTypes(DataType* outputs, std::int32_t output_count, const DataType* inputs,
                                        std::int32_t input_count) const noexcept {
  return guarded<std::int32_t>(kInternal, [&]() -> std::int32_t {
    Node node;
    if (std::string reason = read(static_cast<std::size_t>(input_count), node); !reason.empty()) return fail(kWrongNode, reason);
    std::string reason;
    const Plan* plan = plan_of_types(node, {inputs, inputs + input_count}, reason);
    if (plan == nullptr) return fail(kWrongNode, reason);
    for (std::size_t i = 0; i < op_.outputs.size() && i < static_cast<std::size_t>(output_count); ++i) {
      outputs[i] = type_of(find(*plan, op_.outputs[i].name)->element);
    }
    return kDone;
  });
}

std::int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count, const nvinfer1::DimsExprs*, std::int32_t,
                                     nvinfer1::DimsExprs* outputs, std::int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded<std::int32_t>(kInternal, [&]() -> std::int32_t {
    Node node;
    if (std::string reason = read(static_cast<std::size_t>(input_count), node); !reason.empty()) return fail(kWrongNode, reason);
    std::vector<Shape<Symbols::Value>> shapes;
    for (std::int32_t i = 0; i < input_count; ++i) shapes.emplace_back(inputs[i].d, inputs[i].d + inputs[i].nbDims);
    Symbols symbols{builder};
    Values<Symbols::Value> sizes;
    if (std::string reason = isthmus::solve(op_, node, shapes, symbols, sizes); !reason.empty()) return fail(kWrongSizes, reason);
    for (std::size_t i = 0; i < op_.outputs.size() && i < static_cast<std::size_t>(output_count); ++i) {
      const Names& shape = op_.outputs[i].shape;
      outputs[i].nbDims = static_cast<std::int32_t>(shape.size());
      for (std::size_t axis = 0; axis < shape.size(); ++axis) outputs[i].d[axis] = evaluate(parse_size(shape[axis]), sizes, symbols);
    }
    return kDone;
  });
}

bool Plugin::supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, std::int32_t input_count,
                                       std::int32_t) noexcept {
  return guarded(false, [&] {
    Node node;
    if (tensors[position].desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (!read(static_cast<std::size_t>(input_count), node).empty()) return false;
    std::vector<DataType> types;
    for (std::int32_t i = 0; i < input_count && i <= position; ++i) types.push_back(tensors[i].desc.type);
    // An input without effect is of any type: it is never read.
    std::string reason;
    const Plan* plan = plan_of_types(node, types, reason);
    if (plan == nullptr || position < input_count) return plan != nullptr;
    const Tensor* output = find(*plan, op_.outputs.at(static_cast<std::size_t>(position - input_count)).name);
    return element_of(tensors[position].desc.type) == output->element;
  });
}

std::int32_t Plugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                     const nvinfer1::DynamicPluginTensorDesc*, std::int32_t) noexcept {
  return guarded<std::int32_t>(kInternal, [&]() -> std::int32_t {
    Node node;
    if (std::string reason = read(static_cast<std::size_t>(input_count), node); !reason.empty()) return fail(kWrongNode, reason);
    // The sizes at both ends of the range and in its middle, so that what no kernel takes fails while the engine is built.
    for (const nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::*which :
         {&nvinfer1::DynamicPluginTensorDesc::min, &nvinfer1::DynamicPluginTensorDesc::opt, &nvinfer1::DynamicPluginTensorDesc::max}) {
      std::vector<const nvinfer1::Dims*> shapes;
      for (std::int32_t i = 0; i < input_count; ++i) shapes.push_back(&(inputs[i].*which));
      bool known = true;
      for (const nvinfer1::Dims* shape : shapes) {
        for (std::int32_t axis = 0; axis < shape->nbDims; ++axis) known = known && shape->d[axis] >= 0;
      }
      if (!known) continue;
      Sizes sizes;
      if (std::string reason = solve(node, shapes.data(), sizes); !reason.empty()) return fail(kWrongSizes, reason);
      std::vector<DataType> types;
      for (std::int32_t i = 0; i < input_count; ++i) types.push_back(inputs[i].desc.type);
      std::string reason;
      const auto wrong = [&](const Plan& plan) { return mismatch(plan, node, types); };
      if (choose(node.form, wrong, sizes, reason) == nullptr) return fail(kWrongSizes, reason);
    }
    return kDone;
  });
}

std::string Plugin::solve(const Node& node, const nvinfer1::Dims* const* shapes, Sizes& sizes) const {
  std::vector<Shape<std::int64_t>> numbers;
  for (std::size_t i = 0; i < node.inputs.size(); ++i) numbers.emplace_back(shapes[i]->d, shapes[i]->d + shapes[i]->nbDims);
  return solve_numbers(op_, node, numbers, sizes);
}

std::vector<std::pair<std::string, std::size_t>> Plugin::zeros(const Node& node, const Plan& plan, const Sizes& sizes) const {
  std::vector<std::pair<std::string, std::size_t>> result;
  for (const std::string& name : node.zeros) result.emplace_back(name, bytes(find(op_.inputs, name), plan, sizes));
  return result;
}

std::size_t Plugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                     const nvinfer1::DynamicPluginTensorDesc*, std::int32_t) const noexcept {
  // Where it cannot be known, more than any device has: building fails with TensorRT's message below ours.
  constexpr std::size_t unknown = std::numeric_limits<std::size_t>::max() / 4;
  return guarded(unknown, [&] {
    Node node;
    Sizes sizes;
    std::vector<const nvinfer1::Dims*> shapes;
    for (std::int32_t i = 0; i < input_count; ++i) shapes.push_back(&inputs[i].max);
    std::string reason = read(static_cast<std::size_t>(input_count), node);
    if (reason.empty()) reason = solve(node, shapes.data(), sizes);
    if (!reason.empty()) {
      fail(kWrongSizes, reason);
      return unknown;
    }
    // Which plan runs depends on the sizes: the most that any of them takes.
    std::size_t most = 0;
    for (const Plan& plan : plans()) {
      if (plan.form != node.form || element_of(inputs[0].desc.type) != plan.activations) continue;
      std::vector<std::int64_t> values = values_of(plan, sizes);
      if (plan.fits(values.data()) == 0) continue;
      plan.sizes(values.data());
      std::vector<std::size_t> absent;
      for (const auto& item : zeros(node, plan, sizes)) absent.push_back(item.second);
      most = std::max(most, workspace_bytes(plan, values, absent));
    }
    return most;
  });
}

const char* Plugin::getTimingCacheID() noexcept { return cache_id_.c_str(); }

std::int32_t Plugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count, const nvinfer1::PluginTensorDesc*,
                                   std::int32_t) noexcept {
  return guarded<std::int32_t>(kInternal, [&]() -> std::int32_t {
    Node node;
    Sizes sizes;
    std::vector<const nvinfer1::Dims*> shapes;
    std::vector<DataType> types;
    for (std::int32_t i = 0; i < input_count; ++i) {
      shapes.push_back(&inputs[i].dims);
      types.push_back(inputs[i].type);
    }
    if (std::string reason = read(static_cast<std::size_t>(input_count), node); !reason.empty()) return fail(kWrongNode, reason);
    if (std::string reason = solve(node, shapes.data(), sizes); !reason.empty()) return fail(kWrongSizes, reason);
    std::string reason;
    const Plan* plan = choose(node.form, [&](const Plan& one) { return mismatch(one, node, types); }, sizes, reason);
    if (plan == nullptr) return fail(kWrongSizes, reason);
    Names names;
    used_.clear();
    for (std::size_t i = 0; i < node.inputs.size(); ++i) {
      if (node.inputs[i].empty()) continue;
      names.push_back(node.inputs[i]);
      used_.push_back(i);
    }
    for (const Argument& output : op_.outputs) names.push_back(output.name);
    addresses_.resize(names.size());
    reason = prepared_.prepare(*plan, node, names, sizes, zeros(node, *plan, sizes));
    return reason.empty() ? kDone : fail(kNoLaunch, reason);
  });
}

std::int32_t Plugin::enqueue(const nvinfer1::PluginTensorDesc*, const nvinfer1::PluginTensorDesc*, const void* const* inputs,
                             void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded<std::int32_t>(kInternal, [&]() -> std::int32_t {
    if (!prepared_.ready()) return fail(kNoLaunch, "enqueue was called before onShapeChange");
    for (std::size_t i = 0; i < used_.size(); ++i) addresses_[i] = reinterpret_cast<std::uint64_t>(inputs[used_[i]]);
    for (std::size_t i = 0; i < op_.outputs.size(); ++i) addresses_[used_.size() + i] = reinterpret_cast<std::uint64_t>(outputs[i]);
    const std::string reason = prepared_.launch(addresses_, reinterpret_cast<std::uint64_t>(workspace), stream);
    return reason.empty() ? kDone : fail(kNoLaunch, reason);
  });
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

Creator::Creator(const Operator& op, const NodeType& type) : op_(op), type_(type) {
  for (const Attribute& attribute : type_.attributes) names_.emplace_back(attribute.name.c_str(), nullptr, field_type(attribute.type), 1);
  collection_ = {static_cast<std::int32_t>(names_.size()), names_.data()};
}

nvinfer1::IPluginV3* Creator::createPlugin(const nvinfer1::AsciiChar* name, const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  return guarded<nvinfer1::IPluginV3*>(nullptr, [&]() -> nvinfer1::IPluginV3* {
    const std::string layer = name != nullptr ? name : "";
    Fields values;
    if (std::string reason = take_all(type_, fields, values); !reason.empty()) {
      log("isthmus: " + type_.name + (layer.empty() ? "" : " \"" + layer + "\"") + ": " + reason);
      return nullptr;
    }
    return new Plugin(op_, type_, std::move(values), layer);
  });
}

}  // namespace isthmus

// What TensorRT looks for in a plugin library.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { isthmus::finder = finder; }

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  static const std::vector<nvinfer1::IPluginCreatorInterface*> creators = [] {
    std::vector<nvinfer1::IPluginCreatorInterface*> result;
    for (const isthmus::Operator* op : isthmus::operators()) {
      for (const isthmus::NodeType& type : op->types) result.push_back(new isthmus::Creator(*op, type));
    }
    return result;
  }();
  count = static_cast<std::int32_t>(creators.size());
  return creators.data();
}
