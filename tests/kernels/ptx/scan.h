// PTX text into words, with the lines of both the text and the source they come from.
#pragma once

#include <string>
#include <vector>

namespace ptx {

struct Token {
  std::string text;
  int line;   // of the PTX text, from 1
  int place;  // index into Scan::places
};

struct Scan {
  std::vector<Token> tokens;
  std::vector<std::string> places;  // "file:line", and "<file:line" for where it was inlined
};

Scan scan(const std::string& text);

}  // namespace ptx
