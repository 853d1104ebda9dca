// TensorRT node of RWKV-7's time mixing. The formulas and the shapes are those of the schema beside this file.
#include "operator.h"

namespace isthmus {

extern const Operator rwkv7{
    "rwkv7",
    {{"r", {"batch", "length", "num_heads*key"}},
     {"decay", {"batch", "length", "num_heads*key"}},
     {"k", {"batch", "length", "num_heads*key"}},
     {"v", {"batch", "length", "num_heads*value"}},
     {"a", {"batch", "length", "num_heads*key"}},
     {"b", {"batch", "length", "num_heads*key"}},
     {"initial_state", {"batch", "num_heads", "key", "value"}, true}},
    {{"y", {"batch", "length", "num_heads*value"}}, {"last_state", {"batch", "num_heads", "key", "value"}, true}},
    {{"RWKV7", {{"num_heads", Type::integer, true}}, {"r", "decay", "k", "v", "a", "b", "initial_state"}, read_all}},
    nullptr,
};

}  // namespace isthmus
