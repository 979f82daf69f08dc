#include "scan.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <set>
#include <sstream>

namespace ptx {
namespace {

const std::set<std::string> kIgnored = {".version", ".target", ".address_size", ".pragma"};

// file, line, and both of where it was inlined; 0: nowhere.
using Location = std::array<int, 4>;

bool in_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '%' || c == '$' || c == '.';
}

// Without comments; `open`: whether one that began on an earlier line goes on.
std::string without_comments(const std::string& line, bool& open) {
  std::string kept;
  for (size_t i = 0; i < line.size(); ++i) {
    if (open) {
      if (line.compare(i, 2, "*/") == 0) open = false, ++i;
    } else if (line.compare(i, 2, "/*") == 0) {
      open = true, ++i;
    } else if (line.compare(i, 2, "//") == 0) {
      break;
    } else {
      kept += line[i];
    }
  }
  return kept;
}

std::string file_name(std::istringstream& words) {
  std::string path;
  words >> path;
  path = path.substr(path.rfind('/') + 1);
  for (const char c : {'"', ','}) path.erase(std::remove(path.begin(), path.end(), c), path.end());
  return path;
}

Location location(std::istringstream& words) {
  Location at{};
  words >> at[0] >> at[1];
  for (std::string word; words >> word;)
    if (word == "inlined_at") words >> at[2] >> at[3];
  return at;
}

void split(const std::string& line, int number, int place, std::vector<Token>& tokens) {
  for (size_t i = 0; i < line.size();) {
    if (std::isspace(static_cast<unsigned char>(line[i]))) {
      ++i;
      continue;
    }
    size_t end = i + 1;
    if (in_word(line[i]) || line[i] == '-') {
      while (end < line.size() && (in_word(line[end]) || line.compare(end, 2, "::") == 0))
        end += line[end] == ':' ? 2 : 1;
    }
    tokens.push_back({line.substr(i, end - i), number, place});
    i = end;
  }
}

}  // namespace

Scan scan(const std::string& text) {
  Scan result;
  std::map<int, std::string> files;
  std::vector<Location> locations{{}};
  std::istringstream stream(text);
  bool in_comment = false, in_code = true;
  int number = 0;
  for (std::string line; std::getline(stream, line);) {
    ++number;
    line = without_comments(line, in_comment);
    std::istringstream words(line);
    std::string first;
    words >> first;
    if (first == ".file") {  // may come after the code
      int index = 0;
      words >> index;
      files[index] = file_name(words);
    } else if (first == ".section") {
      in_code = false;  // debug information until the end
    } else if (first == ".loc") {
      locations.push_back(location(words));
    } else if (in_code && !kIgnored.count(first)) {
      split(line, number, static_cast<int>(locations.size()) - 1, result.tokens);
    }
  }
  for (const Location& at : locations) {
    std::string place = files[at[0]] + ":" + std::to_string(at[1]);
    if (at[2]) place += "<" + files[at[2]] + ":" + std::to_string(at[3]);
    result.places.push_back(at[0] ? place : "?");
  }
  return result;
}

}  // namespace ptx
