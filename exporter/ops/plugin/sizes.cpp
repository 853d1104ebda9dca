#include "sizes.h"

#include <stdexcept>

namespace isthmus {
namespace {

struct Numbers {
  std::int64_t number(std::int64_t value) const { return value; }
  std::int64_t multiply(std::int64_t a, std::int64_t b) const { return a * b; }
  std::int64_t divide(std::int64_t a, std::int64_t b) const { return b > 0 ? a / b : 0; }
  std::int64_t subtract(std::int64_t a, std::int64_t b) const { return a - b; }
};

}  // namespace

Size parse_size(const std::string& text) {
  Size size;
  if (text.find_first_not_of("0123456789") == std::string::npos) {
    size.number = std::stoll(text);
    return size;
  }
  std::string rest = text;
  if (rest.size() > 2 && rest.compare(rest.size() - 2, 2, "-1") == 0) {
    size.less_one = true;
    rest.resize(rest.size() - 2);
  }
  std::size_t begin = 0;
  for (std::size_t star = rest.find('*'); star != std::string::npos; star = rest.find('*', begin)) {
    size.factors.push_back(rest.substr(begin, star - begin));
    begin = star + 1;
  }
  size.factors.push_back(rest.substr(begin));
  return size;
}

const Argument& find(const std::vector<Argument>& arguments, const std::string& name) {
  for (const Argument& argument : arguments) {
    if (argument.name == name) return argument;
  }
  throw std::out_of_range("no argument " + name);
}

Shape<std::int64_t> shape_of(const Argument& argument, const Sizes& sizes) {
  Shape<std::int64_t> shape;
  Numbers numbers;
  for (const std::string& text : argument.shape) shape.push_back(evaluate(parse_size(text), sizes, numbers));
  return shape;
}

std::string solve_numbers(const Operator& op, const Node& node, const std::vector<Shape<std::int64_t>>& shapes, Sizes& sizes) {
  Numbers numbers;
  if (std::string reason = solve(op, node, shapes, numbers, sizes); !reason.empty()) return reason;
  for (const auto& item : node.integers) {
    if (item.second < 0) return item.first + " is " + std::to_string(item.second) + ", expected at least 0";
  }
  for (std::size_t i = 0; i < node.inputs.size(); ++i) {
    if (node.inputs[i].empty()) continue;
    const Argument& argument = find(op.inputs, node.inputs[i]);
    const Shape<std::int64_t> expected = shape_of(argument, sizes);
    for (std::size_t axis = 0; axis < expected.size(); ++axis) {
      if (shapes[i][axis] != expected[axis] || expected[axis] < 1) {
        return argument.name + " has " + std::to_string(shapes[i][axis]) + " on axis " + std::to_string(axis) + ", expected " +
               (expected[axis] < 1 ? "at least 1" : std::to_string(expected[axis])) + " (" + argument.shape[axis] + ")";
      }
    }
  }
  return op.check != nullptr ? op.check(sizes) : "";
}

std::string count_inputs(const NodeType& type, std::size_t got, std::size_t least, std::size_t most) {
  if (got >= least && got <= most) return "";
  std::string names;
  for (std::size_t i = 0; i < most; ++i) names += (i > 0 ? ", " : "") + type.inputs[i];
  const std::string range = least == most ? std::to_string(most) : std::to_string(least) + " to " + std::to_string(most);
  return "has " + std::to_string(got) + " inputs, expected " + range + " (" + names + ")";
}

std::string read_all(const NodeType& type, const Fields& fields, std::size_t inputs, Node& node) {
  node.form = type.name;
  node.inputs = type.inputs;
  node.integers = fields.integers;
  node.reals = fields.reals;
  return count_inputs(type, inputs, type.inputs.size(), type.inputs.size());
}

}  // namespace isthmus
