// TensorRT node of normalised linear attention. The formulas and the shapes are those of the schema beside this file.
#include "operator.h"

namespace isthmus {
namespace {

std::string read(const NodeType& type, const Fields& fields, std::size_t inputs, Node& node) {
  if (fields.reals.at("eps") < 0.0F) return "eps is " + std::to_string(fields.reals.at("eps")) + ", expected at least 0";
  return read_all(type, fields, inputs, node);
}

}  // namespace

extern const Operator normalized_linear_attention{
    "normalized_linear_attention",
    {{"q", {"batch", "length", "num_heads*key"}}, {"k", {"batch", "tokens", "num_heads*key"}}, {"v", {"batch", "tokens", "num_heads*value"}}},
    {{"y", {"batch", "length", "num_heads*value"}}},
    {{"NormalizedLinearAttention",
      {{"num_heads", Type::integer, true}, {"eps", Type::real, false, 1e-15}},
      {"q", "k", "v"},
      read}},
    nullptr,
};

}  // namespace isthmus
