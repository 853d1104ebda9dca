// TensorRT nodes of linear attention: ours, and the standard's `LinearAttention` (opset 27), for which TensorRT's parser looks for a plugin
// of that name. The formulas and the shapes are those of the schema beside this file.
#include "operator.h"

namespace isthmus {
namespace {

const std::vector<Attribute> kAttributes{
    {"q_num_heads", Type::integer, true}, {"kv_num_heads", Type::integer, true}, {"scale", Type::real}};
const Names kStandard{"q", "k", "v", "initial_state", "decay", "beta"};

struct Rule {
  const char* name;
  const char* form;
  bool decay;
  bool beta;
};
constexpr Rule kRules[] = {{"linear", "PlainLinearAttention", false, false},
                           {"gated", "GatedLinearAttention", true, false},
                           {"delta", "DeltaLinearAttention", false, true},
                           {"gated_delta", "GatedDeltaLinearAttention", true, true}};

// Reads a node of the standard's.
std::string read_standard(const NodeType& type, const Fields& fields, std::size_t inputs, Node& node) {
  const std::string& name = fields.texts.at("update_rule");
  const Rule* rule = nullptr;
  std::string known;
  for (const Rule& one : kRules) {
    if (name == one.name) rule = &one;
    known += (known.empty() ? "" : ", ") + std::string(one.name);
  }
  if (rule == nullptr) return "update_rule is '" + name + "', expected one of " + known;
  const std::size_t least = rule->beta ? 6 : rule->decay ? 5 : 3;
  if (std::string reason = count_inputs(type, inputs, least, 6); !reason.empty()) return "update_rule " + name + ": " + reason;
  node.form = rule->form;
  node.inputs.assign(kStandard.begin(), kStandard.begin() + static_cast<std::ptrdiff_t>(inputs));
  if (inputs > 4 && !rule->decay) node.inputs[4].clear();
  if (inputs > 5 && !rule->beta) node.inputs[5].clear();
  if (inputs < 4) node.zeros = {"initial_state"};
  node.integers = {{"q_num_heads", fields.integers.at("q_num_heads")}, {"kv_num_heads", fields.integers.at("kv_num_heads")}};
  node.reals = {{"scale", fields.reals.at("scale")}};
  return "";
}

std::string check(const Sizes& sizes) {
  const std::int64_t heads = sizes.at("kv_num_heads");
  if (sizes.at("q_num_heads") % heads != 0) {
    return "q_num_heads is " + std::to_string(sizes.at("q_num_heads")) + ", not a multiple of kv_num_heads = " + std::to_string(heads);
  }
  if (const auto decays = sizes.find("decays"); decays != sizes.end() && decays->second != 1 && decays->second != sizes.at("key")) {
    return "decay has " + std::to_string(decays->second) + " numbers a head, expected 1 or " + std::to_string(sizes.at("key"));
  }
  if (const auto betas = sizes.find("betas"); betas != sizes.end() && betas->second != 1 && betas->second != heads) {
    return "beta has " + std::to_string(betas->second) + " on axis 2, expected 1 or " + std::to_string(heads);
  }
  return "";
}

}  // namespace

extern const Operator linear_attention{
    "linear_attention",
    {{"q", {"batch", "length", "q_num_heads*key"}},
     {"k", {"batch", "length", "kv_num_heads*key"}},
     {"v", {"batch", "length", "kv_num_heads*value"}},
     {"decay", {"batch", "length", "kv_num_heads*decays"}},
     {"beta", {"batch", "length", "betas"}},
     {"initial_state", {"batch", "kv_num_heads", "key", "value"}, true}},
    {{"y", {"batch", "length", "q_num_heads*value"}}, {"last_state", {"batch", "kv_num_heads", "key", "value"}, true}},
    {{"LinearAttention",
      {{"q_num_heads", Type::integer, true},
       {"kv_num_heads", Type::integer, true},
       {"scale", Type::real},
       {"update_rule", Type::text},
       {"chunk_size", Type::integer}},
      kStandard,
      read_standard},
     {"PlainLinearAttention", kAttributes, {"q", "k", "v", "initial_state"}, read_all},
     {"GatedLinearAttention", kAttributes, {"q", "k", "v", "initial_state", "decay"}, read_all},
     {"DeltaLinearAttention", kAttributes, {"q", "k", "v", "initial_state", "beta"}, read_all},
     {"GatedDeltaLinearAttention", kAttributes, {"q", "k", "v", "initial_state", "decay", "beta"}, read_all}},
    check,
};

}  // namespace isthmus
