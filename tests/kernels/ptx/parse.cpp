// The parser: functions, their registers and parameters, and instructions.
#include <cstdlib>
#include <stdexcept>

#include "program.h"
#include "scan.h"
#include "words.h"

namespace ptx {
namespace {

const std::map<std::string, Special> kSpecials = {{"%tid.x", Special::kThreadX},
                                                  {"%tid.y", Special::kThreadY},
                                                  {"%tid.z", Special::kThreadZ},
                                                  {"%ntid.x", Special::kThreadsX},
                                                  {"%ntid.y", Special::kThreadsY},
                                                  {"%ntid.z", Special::kThreadsZ},
                                                  {"%ctaid.x", Special::kBlockX},
                                                  {"%ctaid.y", Special::kBlockY},
                                                  {"%ctaid.z", Special::kBlockZ},
                                                  {"%nctaid.x", Special::kBlocksX},
                                                  {"%nctaid.y", Special::kBlocksY},
                                                  {"%nctaid.z", Special::kBlocksZ},
                                                  {"%laneid", Special::kLane},
                                                  {"%warpid", Special::kWarp},
                                                  {"%lanemask_lt", Special::kLanesBelow},
                                                  {"%lanemask_le", Special::kLanesUpTo},
                                                  {"%lanemask_eq", Special::kLanesEqual},
                                                  {"%lanemask_ge", Special::kLanesFrom},
                                                  {"%lanemask_gt", Special::kLanesAbove}};

bool is_number(const std::string& word) {
  return std::isdigit(static_cast<unsigned char>(word[0])) || (word[0] == '-' && word.size() > 1);
}

// Also of floats, "0f3F800000" and "0d...", by their bits.
int64_t number(const std::string& word) {
  const bool is_bits = word.size() > 9 && word[0] == '0' && std::string("fFdD").find(word[1]) != std::string::npos;
  if (is_bits) return static_cast<int64_t>(std::stoull(word.substr(2), nullptr, 16));
  if (word[0] == '-') return -static_cast<int64_t>(std::stoull(word.substr(1), nullptr, 0));
  return static_cast<int64_t>(std::stoull(word, nullptr, 0));
}

int64_t align(int64_t offset, int64_t to) { return (offset + to - 1) / to * to; }

class Parser {
 public:
  explicit Parser(Scan scan) : tokens_(std::move(scan.tokens)), places_(std::move(scan.places)) {}

  Module module() {
    Module module;
    while (at_ < tokens_.size()) {
      if (accept(".visible") || accept(".weak") || accept(".extern")) continue;
      if (accept(".entry"))
        entry(module);
      else if (peek() == ".shared" || peek() == ".global" || peek() == ".const")
        variable();
      else
        fail("an unknown directive");
    }
    return module;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    const Token& token = tokens_[std::min(at_, tokens_.size() - 1)];
    throw std::runtime_error("PTX line " + std::to_string(token.line) + ": " + what + ", at '" + token.text + "'");
  }
  const std::string& peek(size_t ahead = 0) const {
    static const std::string kNone;
    return at_ + ahead < tokens_.size() ? tokens_[at_ + ahead].text : kNone;
  }
  std::string next() {
    if (at_ >= tokens_.size()) fail("an unexpected end");
    return tokens_[at_++].text;
  }
  bool accept(const std::string& text) {
    if (peek() != text) return false;
    ++at_;
    return true;
  }
  void expect(const std::string& text) {
    if (!accept(text)) fail("expected '" + text + "'");
  }
  int integer() { return static_cast<int>(number(next())); }

  int new_row(int bytes) {
    f_->widths.push_back(static_cast<uint8_t>(bytes));
    return f_->rows() - 1;
  }
  int constant(uint64_t value) {
    const auto [it, fresh] = constants_.try_emplace(value, 0);
    if (fresh) {
      it->second = new_row(8);
      f_->constants.push_back({it->second, value});
    }
    return it->second;
  }

  int row() {
    const std::string name = next();
    if (name == "_") return kNoRow;
    if (is_number(name)) return constant(static_cast<uint64_t>(number(name)));
    if (const auto it = registers_.find(name); it != registers_.end()) return it->second;
    if (const auto it = kSpecials.find(name); it != kSpecials.end()) {
      registers_[name] = new_row(8);
      f_->specials.push_back({registers_[name], it->second});
      return registers_[name];
    }
    if (const auto it = addresses_.find(name); it != addresses_.end()) return constant(it->second);
    --at_;
    fail("an unknown name");
  }

  Operand operand() {
    Operand operand;
    const auto add = [&] {
      if (operand.count == static_cast<int>(operand.rows.size())) fail("too long a vector");
      operand.rows[operand.count++] = row();
    };
    if (accept("{")) {
      do add();
      while (accept(","));
      expect("}");
    } else if (accept("[")) {
      add();
      if (accept("+")) operand.offset = number(next());
      expect("]");
    } else {
      add();
    }
    return operand;
  }

  Type type() {
    const std::string word = next();
    if (!is_type(word.substr(1))) fail("an unknown type");
    return type_of(word.substr(1));
  }

  // After ".reg".
  void registers() {
    const int bytes = bytes_of(type());
    do {
      const std::string name = next();
      if (!accept("<")) {
        registers_[name] = new_row(bytes);
        continue;
      }
      const int count = integer();
      expect(">");
      for (int i = 0; i < count; ++i) registers_[name + std::to_string(i)] = new_row(bytes);
    } while (accept(","));
    expect(";");
  }

  struct Declared {
    std::string name;
    int64_t alignment, bytes;
    bool shared;
  };
  // Of a variable or parameter: words, the name, and how many. An array of unknown length has none.
  Declared declared() {
    Declared result{"", 0, 0, false};
    bool is_pointer = false;
    while (peek()[0] == '.') {
      const std::string word = next();
      if (word == ".shared") result.shared = true;
      if (word == ".ptr") is_pointer = true;
      if (word == ".align") {
        const int64_t given = number(next());
        if (!is_pointer) result.alignment = given;  // else: of what it points to
      }
      if (is_type(word.substr(1))) result.bytes = bytes_of(type_of(word.substr(1)));
    }
    if (!result.alignment) result.alignment = result.bytes;
    result.name = next();
    if (accept("[")) {
      result.bytes *= peek() == "]" ? 0 : number(next());
      expect("]");
    }
    return result;
  }

  // In shared memory, or one that is only named.
  void variable() {
    const Declared d = declared();
    while (!accept(";")) next();
    if (!d.shared) return;
    static_shared_ = align(static_shared_, d.alignment);
    addresses_[d.name] = static_cast<uint64_t>(static_shared_);
    static_shared_ += d.bytes;
  }

  void parameters() {
    while (!accept(")")) {
      const Declared d = declared();
      const auto offset = static_cast<int>(align(f_->param_bytes, d.alignment));
      addresses_[d.name] = static_cast<uint64_t>(offset);
      f_->params.push_back({offset, static_cast<int>(d.bytes)});
      f_->param_bytes = offset + static_cast<int>(d.bytes);
      accept(",");
    }
  }

  void entry(Module& module) {
    const std::string name = next();
    f_ = &module[name];
    f_->name = name;
    f_->places = places_;
    registers_.clear(), labels_.clear(), constants_.clear(), jumps_.clear();
    if (accept("(")) parameters();
    while (peek() != "{") next();  // .maxntid and the like
    next();
    body();
    Instruction end;
    end.op = Op::kExit;
    add(end, "end");
    for (const auto& [index, label] : jumps_) {
      if (!labels_.count(label)) throw std::runtime_error("PTX of " + name + ": no label " + label);
      f_->code[index].target = labels_[label];
    }
    f_->static_shared = static_cast<int>(static_shared_);
  }

  void body() {
    for (int depth = 1; depth > 0;) {
      if (accept("{")) {
        ++depth;
      } else if (accept("}")) {
        --depth;
      } else if (accept(";")) {
      } else if (accept(".reg")) {
        registers();
      } else if (peek() == ".shared") {
        variable();
      } else if (peek(1) == ":") {
        labels_[next()] = static_cast<int>(f_->code.size());
        next();
      } else {
        instruction();
      }
    }
  }

  void add(const Instruction& instruction, const std::string& opcode) {
    f_->code.push_back(instruction);
    f_->opcodes.push_back(opcode);
  }

  void instruction() {
    Instruction in;
    in.line = tokens_[at_].line;
    in.place = tokens_[at_].place;
    if (accept("@")) {
      in.negated = accept("!");
      in.guard = row();
    }
    const std::string opcode = next();
    try {
      describe(opcode, in);
    } catch (const std::invalid_argument& error) {
      --at_;
      fail(error.what());
    }
    if (in.op == Op::kBranch) {
      jumps_.push_back({f_->code.size(), next()});
    } else {
      while (peek() != ";") {
        if (in.count) expect(",");
        if (in.count == static_cast<int>(in.operands.size())) fail("too many operands");
        in.operands[in.count++] = operand();
        if (in.count == 1 && accept("|")) in.second = row();
      }
    }
    expect(";");
    add(in, opcode);
  }

  std::vector<Token> tokens_;
  std::vector<std::string> places_;
  size_t at_ = 0;
  int64_t static_shared_ = 0;
  std::map<std::string, uint64_t> addresses_;  // of variables in shared memory, and of parameters
  Function* f_ = nullptr;
  std::map<std::string, int> registers_, labels_;
  std::map<uint64_t, int> constants_;
  std::vector<std::pair<size_t, std::string>> jumps_;
};

}  // namespace

std::string Function::where(int pc) const {
  const Instruction& in = code[pc];
  return "line " + std::to_string(in.line) + " " + opcodes[pc] + " (" + places[in.place] + ")";
}

Module parse(const std::string& text) { return Parser(scan(text)).module(); }

}  // namespace ptx
