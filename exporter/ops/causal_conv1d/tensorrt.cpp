// TensorRT nodes of the causal convolution: ours, and the standard's `CausalConvWithState` (opset 27), for which TensorRT's parser looks
// for a plugin of that name. The formulas and the shapes are those of the schema beside this file.
#include "operator.h"

namespace isthmus {
namespace {

const Names kInputs{"x", "weight", "bias", "initial_state"};

// TensorRT's parser takes no gap among the inputs: a bias, or both, may be left out at the end.
std::string read_standard(const NodeType& type, const Fields& fields, std::size_t inputs, Node& node) {
  const std::string& activation = fields.texts.at("activation");
  const bool silu = activation == "silu" || activation == "swish";
  if (!silu && activation != "none") return "activation is '" + activation + "', expected silu, swish or none";
  if (fields.integers.at("ndim") != 1) return "ndim is " + std::to_string(fields.integers.at("ndim")) + ", expected 1";
  if (std::string reason = count_inputs(type, inputs, 2, 4); !reason.empty()) return reason;
  node.form = "CausalConv1d";
  node.inputs.assign(kInputs.begin(), kInputs.begin() + static_cast<std::ptrdiff_t>(inputs));
  node.zeros.assign(kInputs.begin() + static_cast<std::ptrdiff_t>(inputs), kInputs.end());
  node.integers["silu"] = silu ? 1 : 0;
  return "";
}

std::string check(const Sizes& sizes) {
  return sizes.at("width") >= 2 ? "" : "weight has width " + std::to_string(sizes.at("width")) + ", expected at least 2";
}

}  // namespace

extern const Operator causal_conv1d{
    "causal_conv1d",
    {{"x", {"batch", "channels", "length"}},
     {"weight", {"channels", "1", "width"}},
     {"bias", {"channels"}},
     {"initial_state", {"batch", "channels", "width-1"}}},
    {{"y", {"batch", "channels", "length"}}, {"last_state", {"batch", "channels", "width-1"}}},
    {{"CausalConv1d", {{"silu", Type::integer}}, kInputs, read_all},
     {"CausalConvWithState", {{"activation", Type::text, false, 0.0, "none"}, {"ndim", Type::integer, false, 1.0}}, kInputs, read_standard}},
    check,
};

}  // namespace isthmus
