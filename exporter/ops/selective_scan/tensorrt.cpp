// TensorRT nodes of the selective scan. The formulas and the shapes are those of the schema beside this file.
#include "operator.h"

namespace isthmus {
namespace {

const Names kPlain{"u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state"};
const Names kGated{"u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state", "z"};
const std::vector<Attribute> kAttributes{{"delta_softplus", Type::integer}, {"reverse", Type::integer}};

std::string check(const Sizes& sizes) {
  const std::int64_t channels = sizes.at("channels");
  const std::int64_t groups = sizes.at("groups");
  if (channels % groups == 0) return "";
  return "B has " + std::to_string(groups) + " groups, which do not divide " + std::to_string(channels) + " channels";
}

}  // namespace

extern const Operator selective_scan{
    "selective_scan",
    {{"u", {"batch", "length", "channels"}},
     {"delta", {"batch", "length", "channels"}},
     {"A", {"channels", "state"}, true},
     {"B", {"batch", "length", "groups*state"}},
     {"C", {"batch", "length", "groups*state"}},
     {"D", {"channels"}, true},
     {"z", {"batch", "length", "channels"}},
     {"delta_bias", {"channels"}, true},
     {"initial_state", {"batch", "channels", "state"}, true}},
    {{"y", {"batch", "length", "channels"}}, {"last_state", {"batch", "channels", "state"}, true}},
    {{"SelectiveScan", kAttributes, kPlain, read_all}, {"GatedSelectiveScan", kAttributes, kGated, read_all}},
    check,
};

}  // namespace isthmus
