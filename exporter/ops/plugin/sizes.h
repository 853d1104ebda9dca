// Sizes from shapes, by the rules of the schema, for numbers and for TensorRT's symbolic dimensions alike.
#ifndef ISTHMUS_SIZES_H
#define ISTHMUS_SIZES_H

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "operator.h"

namespace isthmus {

// A size of a shape, taken apart: the product of `factors`, less one where `less_one`; without factors, `number`.
struct Size {
  Names factors;
  bool less_one = false;
  std::int64_t number = 1;
};

Size parse_size(const std::string& text);

template <class Value>
using Values = std::map<std::string, Value>;

template <class Value>
using Shape = std::vector<Value>;

// The value of a size. `Arithmetic` has number, multiply, divide and subtract.
template <class Value, class Arithmetic>
Value evaluate(const Size& size, const Values<Value>& values, Arithmetic& arithmetic) {
  if (size.factors.empty()) return arithmetic.number(size.number);
  Value result = values.at(size.factors.front());
  for (std::size_t i = 1; i < size.factors.size(); ++i) result = arithmetic.multiply(result, values.at(size.factors[i]));
  return size.less_one ? arithmetic.subtract(result, arithmetic.number(1)) : result;
}

const Argument& find(const std::vector<Argument>& arguments, const std::string& name);

// The value of every name in the shapes, from those of a node's inputs. Names first, then what products determine.
//
// Returns why it cannot be found; empty when it was. Whether sizes that several inputs share agree is not looked at.
template <class Value, class Arithmetic>
std::string solve(const Operator& op, const Node& node, const std::vector<Shape<Value>>& shapes, Arithmetic& arithmetic,
                  Values<Value>& values) {
  for (const auto& item : node.integers) values[item.first] = arithmetic.number(item.second);
  struct Unknown {
    Size size;
    Value got;
  };
  std::vector<Unknown> products;
  for (std::size_t i = 0; i < node.inputs.size(); ++i) {
    if (node.inputs[i].empty()) continue;
    const Argument& argument = find(op.inputs, node.inputs[i]);
    if (shapes[i].size() != argument.shape.size()) {
      return argument.name + " has " + std::to_string(shapes[i].size()) + " axes, expected " + std::to_string(argument.shape.size());
    }
    for (std::size_t axis = 0; axis < argument.shape.size(); ++axis) {
      Size size = parse_size(argument.shape[axis]);
      if (size.factors.size() == 1 && !size.less_one) {
        values.emplace(size.factors.front(), shapes[i][axis]);
      } else if (size.factors.size() > 1) {
        products.push_back({size, shapes[i][axis]});
      }
    }
  }
  for (const Unknown& product : products) {
    std::string unknown;
    Value known = arithmetic.number(1);
    for (const std::string& factor : product.size.factors) {
      const auto found = values.find(factor);
      if (found != values.end()) {
        known = arithmetic.multiply(known, found->second);
      } else if (unknown.empty()) {
        unknown = factor;
      } else {
        return unknown + " and " + factor + " are not determined";
      }
    }
    if (!unknown.empty()) values.emplace(unknown, arithmetic.divide(product.got, known));
  }
  return "";
}

// As above for numbers, with every size compared and the operator's own check.
std::string solve_numbers(const Operator& op, const Node& node, const std::vector<Shape<std::int64_t>>& shapes, Sizes& sizes);

// The shape of an argument, for sizes that are known.
Shape<std::int64_t> shape_of(const Argument& argument, const Sizes& sizes);

}  // namespace isthmus

#endif
