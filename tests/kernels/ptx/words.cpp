#include "words.h"

#include <algorithm>
#include <set>
#include <sstream>
#include <stdexcept>

namespace ptx {
namespace {

const std::map<std::string, Type> kTypes = {
    {"pred", Type::kPred}, {"b8", Type::kB8},       {"b16", Type::kB16},      {"b32", Type::kB32},
    {"b64", Type::kB64},   {"u8", Type::kU8},       {"u16", Type::kU16},      {"u32", Type::kU32},
    {"u64", Type::kU64},   {"s8", Type::kS8},       {"s16", Type::kS16},      {"s32", Type::kS32},
    {"s64", Type::kS64},   {"f16", Type::kF16},     {"bf16", Type::kBF16},    {"f32", Type::kF32},
    {"f64", Type::kF64},   {"f16x2", Type::kF16x2}, {"bf16x2", Type::kBF16x2}};

const std::map<std::string, Op> kOps = {{"abs", Op::kAbs},
                                        {"add", Op::kAdd},
                                        {"and", Op::kAnd},
                                        {"atom", Op::kAtomic},
                                        {"bar", Op::kBarrier},
                                        {"barrier", Op::kBarrier},
                                        {"bfe", Op::kBfe},
                                        {"bfi", Op::kBfi},
                                        {"bfind", Op::kBfind},
                                        {"bra", Op::kBranch},
                                        {"brev", Op::kBrev},
                                        {"clz", Op::kClz},
                                        {"cp", Op::kCopy},
                                        {"cvt", Op::kConvert},
                                        {"cvta", Op::kConvertAddress},
                                        {"div", Op::kDiv},
                                        {"ex2", Op::kExp2},
                                        {"exit", Op::kExit},
                                        {"fence", Op::kFence},
                                        {"fma", Op::kFma},
                                        {"ld", Op::kLoad},
                                        {"ldmatrix", Op::kLoadMatrix},
                                        {"lg2", Op::kLog2},
                                        {"lop3", Op::kLop3},
                                        {"dp4a", Op::kDot},
                                        {"mad", Op::kMad},
                                        {"max", Op::kMax},
                                        {"membar", Op::kFence},
                                        {"min", Op::kMin},
                                        {"mma", Op::kMma},
                                        {"mov", Op::kMove},
                                        {"mul", Op::kMul},
                                        {"neg", Op::kNeg},
                                        {"not", Op::kNot},
                                        {"or", Op::kOr},
                                        {"popc", Op::kPopc},
                                        {"prmt", Op::kPermute},
                                        {"rcp", Op::kReciprocal},
                                        {"red", Op::kAtomic},
                                        {"redux", Op::kReduce},
                                        {"rem", Op::kRem},
                                        {"ret", Op::kExit},
                                        {"rsqrt", Op::kRsqrt},
                                        {"selp", Op::kSelect},
                                        {"setp", Op::kSetPredicate},
                                        {"shf", Op::kShiftFunnel},
                                        {"shfl", Op::kShuffle},
                                        {"shl", Op::kShl},
                                        {"shr", Op::kShr},
                                        {"sqrt", Op::kSqrt},
                                        {"st", Op::kStore},
                                        {"stmatrix", Op::kStoreMatrix},
                                        {"sub", Op::kSub},
                                        {"vote", Op::kVote},
                                        {"xor", Op::kXor}};

const std::set<Op> kFlushing = {Op::kExp2, Op::kLog2, Op::kReciprocal, Op::kRsqrt, Op::kSqrt};
const std::map<std::string, uint8_t> kComparisons = {
    {"eq", kEq},   {"ne", kNe},   {"lt", kLt},   {"le", kLe},   {"gt", kGt},   {"ge", kGe},
    {"equ", kEqu}, {"neu", kNeu}, {"ltu", kLtu}, {"leu", kLeu}, {"gtu", kGtu}, {"geu", kGeu},
    {"num", kNum}, {"nan", kNan}, {"lo", kLt},   {"ls", kLe},   {"hi", kGt},   {"hs", kGe}};
const std::map<std::string, uint8_t> kExchanges = {
    {"idx", kIndexed}, {"up", kUp}, {"down", kDown}, {"bfly", kButterfly}};
const std::map<std::string, uint8_t> kReductions = {{"add", kSum},    {"min", kMinimum},        {"max", kMaximum},
                                                    {"and", kBitAnd}, {"or", kBitOr},           {"xor", kBitXor},
                                                    {"exch", kSwap},  {"cas", kCompareAndSwap}, {"inc", kIncrement}};
const std::map<std::string, uint8_t> kBallots = {
    {"ballot", kBallotAll}, {"any", kAny}, {"all", kAll}, {"uni", kUniform}};
const std::map<std::string, uint8_t> kRoundings = {
    {"rzi", kToZero}, {"rz", kToZero}, {"rni", kToNearestInteger}, {"rmi", kDownwards}, {"rpi", kUpwards}};
const std::map<std::string, Space> kSpaces = {{"global", Space::kGlobal},      {"shared", Space::kShared},
                                              {"shared::cta", Space::kShared}, {"param", Space::kParam},
                                              {"local", Space::kLocal},        {"const", Space::kConst}};

class Words {
 public:
  explicit Words(const std::string& opcode) : words_(words_of(opcode)) {}

  const std::string& first() const { return words_[0]; }
  bool has(const std::string& word) const { return std::find(words_.begin() + 1, words_.end(), word) != words_.end(); }
  bool has_any(std::initializer_list<const char*> words) const {
    return std::any_of(words.begin(), words.end(), [&](const char* word) { return has(word); });
  }
  // What the first word that `table` knows means there.
  template <class T>
  bool find(const std::map<std::string, T>& table, T& value) const {
    for (size_t i = 1; i < words_.size(); ++i)
      if (const auto it = table.find(words_[i]); it != table.end()) return value = it->second, true;
    return false;
  }
  template <class T>
  T require(const std::map<std::string, T>& table) const {
    T value{};
    if (!find(table, value)) throw std::invalid_argument("an unknown kind of " + first());
    return value;
  }
  std::vector<Type> types() const {
    std::vector<Type> found;
    for (size_t i = 1; i < words_.size(); ++i)
      if (is_type(words_[i])) found.push_back(type_of(words_[i]));
    return found;
  }

 private:
  std::vector<std::string> words_;
};

void describe_copy(const Words& words, Instruction& in) {
  if (!words.has("async") || words.has("bulk") || words.has("mbarrier")) throw std::invalid_argument("an unknown copy");
  if (words.has("commit_group")) in.op = Op::kCommitCopies;
  if (words.has("wait_group")) in.op = Op::kWaitCopies;
  if (words.has("wait_all")) in.op = Op::kWaitAllCopies;
}

void describe_memory(const Words& words, Instruction& in) {
  words.find(kSpaces, in.space);
  in.vector = words.has("v4") ? 4 : words.has("v2") ? 2 : 1;
  in.strong = in.op == Op::kAtomic || words.has_any({"volatile", "relaxed", "acquire", "release"});
  in.cached = !in.strong && !words.has_any({"cg", "cv"});
  in.release = words.has_any({"acq_rel", "release", "sc"});
  in.acquire = words.has_any({"acq_rel", "acquire", "sc"});
  in.returns = words.first() == "atom";
  if ((in.op == Op::kLoad || in.op == Op::kStore) && (in.release || in.acquire))
    throw std::invalid_argument("loads that acquire and stores that release are not served");
}

}  // namespace

bool is_type(const std::string& word) { return kTypes.count(word) > 0; }
Type type_of(const std::string& word) { return kTypes.at(word); }

std::vector<std::string> words_of(const std::string& opcode) {
  std::vector<std::string> words;
  std::istringstream stream(opcode);
  for (std::string word; std::getline(stream, word, '.');) words.push_back(word);
  return words;
}

int bytes_of(Type type) {
  switch (type) {
    case Type::kPred:
    case Type::kB8:
    case Type::kU8:
    case Type::kS8:
      return 1;
    case Type::kB16:
    case Type::kU16:
    case Type::kS16:
    case Type::kF16:
    case Type::kBF16:
      return 2;
    case Type::kB64:
    case Type::kU64:
    case Type::kS64:
    case Type::kF64:
      return 8;
    default:
      return 4;
  }
}

bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

bool is_float(Type type) {
  return type == Type::kF32 || type == Type::kF64 || type == Type::kF16 || type == Type::kBF16;
}

void describe(const std::string& opcode, Instruction& in) {
  const Words words(opcode);
  const auto op = kOps.find(words.first());
  if (op == kOps.end()) throw std::invalid_argument("an unknown instruction");
  in.op = op->second;
  const std::vector<Type> types = words.types();
  if (!types.empty()) in.type = types.front(), in.from = types.back();
  in.flush = words.has("ftz");
  if (in.flush && !kFlushing.count(in.op)) throw std::invalid_argument("subnormals flushed here are not served");
  if (words.has_any({"NaN", "sat", "xorsign"})) throw std::invalid_argument("an unknown kind of arithmetic");
  switch (in.op) {
    case Op::kSetPredicate:
      in.mode = words.require(kComparisons);
      if (words.has_any({"and", "or", "xor"})) throw std::invalid_argument("a third operand of setp");
      break;
    case Op::kBarrier:
      if (words.has("warp")) in.op = Op::kWarpBarrier;
      if (!words.has("sync")) throw std::invalid_argument("an unknown barrier");
      break;
    case Op::kShuffle:
      in.mode = words.require(kExchanges);
      break;
    case Op::kVote:
      in.mode = words.require(kBallots);
      break;
    case Op::kReduce:
      in.mode = words.require(kReductions);
      break;
    case Op::kAtomic:
      in.mode = words.require(kReductions);
      describe_memory(words, in);
      break;
    case Op::kMul:
    case Op::kMad:
      in.mode = words.has("wide") ? kWide : words.has("hi") ? kHigh : kLow;
      break;
    case Op::kDot:
      if (types.size() != 2 || types.front() != Type::kS32 || types.back() != Type::kS32)
        throw std::invalid_argument("an unknown product of bytes");
      break;
    case Op::kBfind:
      in.from_sign = words.has("shiftamt");
      break;
    case Op::kShiftFunnel:
      in.right = words.has("r"), in.wraps = words.has("wrap");
      break;
    case Op::kConvert:
      words.find(kRoundings, in.mode);
      if (is_float(in.type) && in.mode != kNearest) throw std::invalid_argument("an unknown rounding");
      break;
    case Op::kConvertAddress:
      words.find(kSpaces, in.space);
      in.to_space = words.has("to");
      break;
    case Op::kLoadMatrix:
    case Op::kStoreMatrix:
      in.space = Space::kShared;
      in.vector = words.has("x4") ? 4 : words.has("x2") ? 2 : 1;
      in.transposed = words.has("trans");
      break;
    case Op::kMma:
      if (!words.has("m16n8k16") || types.front() != Type::kF32) throw std::invalid_argument("an unknown product");
      in.bfloat = words.has("bf16");
      break;
    case Op::kFence:
      in.of_block = !words.has_any({"gl", "gpu", "sys"});
      break;
    case Op::kCopy:
      describe_copy(words, in);
      break;
    case Op::kLoad:
    case Op::kStore:
      describe_memory(words, in);
      break;
    default:
      break;
  }
}

}  // namespace ptx
