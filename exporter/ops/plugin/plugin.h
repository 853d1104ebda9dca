// The TensorRT side: one plugin class and one creator class for every node type of every operator.
#ifndef ISTHMUS_PLUGIN_H
#define ISTHMUS_PLUGIN_H

#include <NvInferRuntime.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "launch.h"
#include "operator.h"

namespace isthmus {

// What the methods of TensorRT's interfaces return.
enum Status : std::int32_t { kDone = 0, kWrongNode = 1, kWrongSizes = 2, kNoLaunch = 3, kInternal = 4 };

// A plugin's attributes as TensorRT takes them. The fields point into the object, so that it is neither copied nor moved.
class SerializedFields {
 public:
  SerializedFields(const NodeType& type, const Fields& fields);
  SerializedFields(const SerializedFields&) = delete;
  SerializedFields& operator=(const SerializedFields&) = delete;
  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  std::deque<std::int64_t> integers_;
  std::deque<float> reals_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const Operator& op, const NodeType& type, Fields fields, std::string layer);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return type_.name.c_str(); }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return "1"; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override { return ""; }

  std::int32_t getNbOutputs() const noexcept override { return static_cast<std::int32_t>(op_.outputs.size()); }
  std::int32_t getOutputDataTypes(nvinfer1::DataType* outputs, std::int32_t output_count, const nvinfer1::DataType* inputs,
                                  std::int32_t input_count) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count, const nvinfer1::DimsExprs* shapes,
                               std::int32_t shape_count, nvinfer1::DimsExprs* outputs, std::int32_t output_count,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, std::int32_t input_count,
                                 std::int32_t output_count) noexcept override;
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc* outputs, std::int32_t output_count) noexcept override;
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc* outputs, std::int32_t output_count) const noexcept override;
  const char* getTimingCacheID() noexcept override;

  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count, const nvinfer1::PluginTensorDesc* outputs,
                             std::int32_t output_count) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions, const nvinfer1::PluginTensorDesc* output_descriptions,
                       const void* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return serialized_.collection(); }

 private:
  std::int32_t fail(Status status, const std::string& what) const;
  std::string read(std::size_t inputs, Node& node) const;
  // Shapes of the inputs as numbers. A size that is not known yet is an error.
  std::string solve(const Node& node, const nvinfer1::Dims* const* shapes, Sizes& sizes) const;
  std::vector<std::pair<std::string, std::size_t>> zeros(const Node& node, const Plan& plan, const Sizes& sizes) const;

  const Operator& op_;
  const NodeType& type_;
  const Fields fields_;
  const std::string layer_;
  SerializedFields serialized_;
  std::string cache_id_;
  Prepared prepared_;
  std::vector<std::size_t> used_;  // inputs that have an effect
  std::vector<std::uint64_t> addresses_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator(const Operator& op, const NodeType& type);

  nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return type_.name.c_str(); }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return "1"; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override { return ""; }

 private:
  const Operator& op_;
  const NodeType& type_;
  std::vector<nvinfer1::PluginField> names_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace isthmus

#endif
