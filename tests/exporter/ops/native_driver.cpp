// Runs one operator on tensors from files: for instruction sets that only an emulator executes, and under sanitizers.
//
// Standard input: "NAME THREADS"; for each input "absent" or "FILE DTYPE BYTES RANK SIZES..."; for each output the same; for each attribute
// "number X" or "text X". Memory of tensors is exactly as large as they are.
#include <stdio.h>
#include <stdlib.h>

#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "operators.h"

extern "C" int isthmus_run(const char*, const isthmus_tensor*, const isthmus_tensor*, const isthmus_attribute*, int, char*, size_t);

namespace {

struct File {
  std::string path;
  std::unique_ptr<char[]> data;
  size_t bytes = 0;
};

isthmus_tensor read_tensor(File& file) {
  isthmus_tensor tensor = {nullptr, {}, -1, 0};
  std::cin >> file.path;
  if (file.path == "absent") return tensor;
  size_t count = 1, item = 0;
  std::cin >> tensor.dtype >> item >> tensor.rank;
  for (int i = 0; i < tensor.rank; ++i) {
    std::cin >> tensor.shape[i];
    count *= static_cast<size_t>(tensor.shape[i]);
  }
  file.bytes = count * item;
  file.data.reset(new char[file.bytes]);
  tensor.data = file.data.get();
  return tensor;
}

}  // namespace

int main() {
  std::string name;
  int threads = 0;
  std::cin >> name >> threads;
  for (const isthmus::Operator& op : isthmus::operators()) {
    if (name != op.name) continue;
    std::vector<File> in(op.inputs.size()), out(op.outputs.size());
    std::vector<isthmus_tensor> inputs, outputs;
    for (File& file : in) {
      inputs.push_back(read_tensor(file));
      if (file.bytes) std::ifstream(file.path, std::ios::binary).read(file.data.get(), static_cast<std::streamsize>(file.bytes));
    }
    for (File& file : out) outputs.push_back(read_tensor(file));
    std::vector<std::string> texts(op.attributes.size());
    std::vector<isthmus_attribute> attributes;
    for (std::string& text : texts) {
      std::string kind;
      std::cin >> kind >> text;
      attributes.push_back({kind == "number" ? strtod(text.c_str(), nullptr) : 0.0, text.c_str()});
    }
    char message[512] = "";
    if (isthmus_run(op.name, inputs.data(), outputs.data(), attributes.data(), threads, message, sizeof(message))) {
      fprintf(stderr, "%s\n", message);
      return 1;
    }
    for (const File& file : out) std::ofstream(file.path, std::ios::binary).write(file.data.get(), static_cast<std::streamsize>(file.bytes));
    return 0;
  }
  fprintf(stderr, "no operator %s\n", name.c_str());
  return 1;
}
