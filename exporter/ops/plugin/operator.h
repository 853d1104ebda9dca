// What a `tensorrt.cpp` says about its operator: arguments, shapes, and the node types under which TensorRT's parser looks for it.
#ifndef ISTHMUS_OPERATOR_H
#define ISTHMUS_OPERATOR_H

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace isthmus {

using Names = std::vector<std::string>;

// A tensor of the operator's schema. Sizes are numbers, names, products of names (`groups*state`), or a name less one (`width-1`).
struct Argument {
  std::string name;
  Names shape;
  bool wide = false;  // float32 whatever the dtype of the activations is
};

enum class Type { integer, real, text };

// An attribute of a node. Booleans are integers, as in ONNX.
struct Attribute {
  std::string name;
  Type type;
  bool required = false;
  double number = 0.0;    // default of an integer or a real
  std::string text = "";  // default of a text
};

// The attributes of one node, defaults filled in.
struct Fields {
  std::map<std::string, std::int64_t> integers;
  std::map<std::string, float> reals;
  std::map<std::string, std::string> texts;
};

// What a node stands for.
struct Node {
  std::string form;                              // the node type of the domain `isthmus` whose kernels compute it
  Names inputs;                                  // the operator's argument that each input is; empty where the input has no effect
  Names zeros;                                   // arguments that the node does not have, and that are zeros then
  std::map<std::string, std::int64_t> integers;  // the operator's attributes
  std::map<std::string, float> reals;
};

// A node type. `read` says what a node with these attributes and this many inputs stands for; a text that is not empty says why it cannot.
struct NodeType {
  std::string name;
  std::vector<Attribute> attributes;
  Names inputs;
  std::string (*read)(const NodeType& type, const Fields& fields, std::size_t inputs, Node& node);
};

using Sizes = std::map<std::string, std::int64_t>;

struct Operator {
  std::string name;
  std::vector<Argument> inputs;
  std::vector<Argument> outputs;
  std::vector<NodeType> types;
  // Why sizes that fit the shapes are still wrong; empty when they are not.
  std::string (*check)(const Sizes& sizes);
};

// The node has every input of its type, in order, and its attributes are the operator's: so are those of our domain.
std::string read_all(const NodeType& type, const Fields& fields, std::size_t inputs, Node& node);

// What such a node lacks, said in the same words everywhere; empty when the number of inputs is right.
std::string count_inputs(const NodeType& type, std::size_t got, std::size_t least, std::size_t most);

// Every operator of this library. Generated, from the folders that have a `tensorrt.cpp`.
const std::vector<const Operator*>& operators();

}  // namespace isthmus

#endif
