// What the words of an opcode mean: "ld.global.cg.v4.u32" is an operation and what follows its dots.
#pragma once

#include <string>
#include <vector>

#include "program.h"

namespace ptx {

// Whether a word names a type, such as "u32".
bool is_type(const std::string& word);
Type type_of(const std::string& word);

std::vector<std::string> words_of(const std::string& opcode);

// Fills in all that the opcode says. Throws std::invalid_argument, with the reason, for what is not served.
void describe(const std::string& opcode, Instruction& instruction);

}  // namespace ptx
