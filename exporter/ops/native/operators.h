// What the schemas say, as tables that the generated source fills, and what follows from them for every operator alike.
#pragma once

#include <string>
#include <vector>

#include "call.h"

namespace isthmus {

// constant * product of the sizes `factors` - less.
struct Dimension {
  int64_t constant;
  int64_t less;
  int count;
  int factors[4];
};

struct Argument {
  const char* name;
  int rank;
  Dimension shape[4];
  bool wide;
  bool optional;
};

struct Attribute {
  const char* name;
  char type;  // b, i, f or s
  int size;   // the size of the same name, or -1
};

struct Fixed {
  int attribute;
  double number;
  const char* text;
};

// An ONNX node type.
struct Form {
  const char* op_type;
  std::vector<int> inputs;
  std::vector<Fixed> fixed;
};

using Kernel = void (*)(const Call&);

struct Operator {
  const char* name;
  std::vector<const char*> sizes;
  std::vector<Argument> inputs;
  std::vector<Argument> outputs;
  std::vector<Attribute> attributes;
  std::vector<Form> forms;
  std::vector<Kernel> kernels;  // one a level, in the order of `levels`
};

// An instruction set that the kernels were compiled for.
struct Level {
  const char* name;
  bool (*executable)();
};

const std::vector<Operator>& operators();  // generated
const std::vector<Level>& levels();

// The level that kernels run at: the best that this processor executes, unless the environment or `choose_level` says otherwise.
size_t current_level();
void choose_level(const std::string& name);  // throws Refusal

// What is wrong with a call, in words.
struct Refusal {
  std::string message;
};

constexpr int64_t UNKNOWN = -1;

// The value of every size, from the inputs that are there (rank >= 0) and the attributes; UNKNOWN sizes (in shape inference) fit everything.
std::vector<int64_t> infer_sizes(const Operator& op, const isthmus_tensor* inputs, const isthmus_attribute* attributes);

// The shape of an output; UNKNOWN where a size is.
std::vector<int64_t> output_shape(const Argument& output, const std::vector<int64_t>& sizes);

// The same for a call: every size is known, and the numbers are not more than any machine holds. Throws Refusal.
constexpr int64_t LARGEST = int64_t{1} << 40;
std::vector<int64_t> bounded_shape(const Operator& op, const Argument& output, const std::vector<int64_t>& sizes);

// Checks dtypes, then runs the kernel. Throws Refusal or std::bad_alloc.
void execute(const Operator& op, const isthmus_tensor* inputs, const isthmus_tensor* outputs, const isthmus_attribute* attributes,
             const std::vector<int64_t>& sizes, const Parallel& parallel);

}  // namespace isthmus
