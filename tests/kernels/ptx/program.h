// A PTX module as the executor runs it: instructions whose operands are rows of a register file. After the public PTX
// ISA; only what nvcc and Triton emit for this project's kernels, and an error for everything else.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ptx {

// clang-format off
enum class Op : uint8_t {
  kAbs, kAdd, kAnd, kAtomic, kBarrier, kBfe, kBfi, kBfind, kBranch, kBrev, kClz, kCommitCopies, kConvert, kConvertAddress,
  kCopy, kDiv, kDot, kExit, kExp2, kFence, kFma, kLoad, kLoadMatrix, kLog2, kLop3, kMad, kMax, kMin, kMma, kMove, kMul, kNeg,
  kNop, kNot, kOr, kPermute, kPopc, kReciprocal, kReduce, kRem, kRsqrt, kSelect, kSetPredicate, kShiftFunnel, kShl, kShr,
  kShuffle, kSqrt, kStore, kStoreMatrix, kSub, kVote, kWaitAllCopies, kWaitCopies, kWarpBarrier, kXor
};
enum class Type : uint8_t {
  kNone, kPred, kB8, kB16, kB32, kB64, kU8, kU16, kU32, kU64, kS8, kS16, kS32, kS64, kF16, kBF16, kF32, kF64, kF16x2,
  kBF16x2
};
// clang-format on
enum class Space : uint8_t { kGeneric, kGlobal, kShared, kParam, kLocal, kConst };

// What Instruction::mode means depends on the operation.
enum Comparison : uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
enum Exchange : uint8_t { kIndexed, kUp, kDown, kButterfly };
enum Reduction : uint8_t { kSum, kMinimum, kMaximum, kBitAnd, kBitOr, kBitXor, kSwap, kCompareAndSwap, kIncrement };
enum Ballot : uint8_t { kBallotAll, kAny, kAll, kUniform };
enum Product : uint8_t { kLow, kHigh, kWide };
enum Rounding : uint8_t { kNearest, kToZero, kToNearestInteger, kDownwards, kUpwards };

constexpr int kNoRow = -1;  // "_", or no operand

struct Operand {
  int count = 0;  // of a vector
  std::array<int, 4> rows{kNoRow, kNoRow, kNoRow, kNoRow};
  int64_t offset = 0;  // of an address
};

struct Instruction {
  Op op = Op::kNop;
  Type type = Type::kNone, from = Type::kNone;  // the first and last type of its name
  Space space = Space::kGeneric;
  uint8_t mode = 0;
  uint8_t vector = 1;                       // elements of a load or store, matrices of ldmatrix and stmatrix
  bool flush = false;                       // .ftz
  bool transposed = false, bfloat = false;  // of matrices
  bool to_space = false;                    // cvta.to
  bool right = false, wraps = false;        // of a funnel shift
  bool from_sign = false;                   // bfind.shiftamt
  bool cached = true;                       // a load that the first-level cache may serve
  bool strong = false;                      // relaxed or volatile, acquire, release: no race with its like
  bool release = false, acquire = false;    // of an atomic
  bool of_block = false;                    // a fence that orders for the own block only
  bool returns = false;                     // atom, not red
  bool negated = false;                     // of the guard
  int guard = kNoRow;
  int target = -1;      // of a branch
  int second = kNoRow;  // second destination, a predicate
  int count = 0;        // operands
  std::array<Operand, 5> operands;
  int line = 0;   // of the PTX text
  int place = 0;  // index into Function::places
};

enum class Special : uint8_t {
  kThreadX,
  kThreadY,
  kThreadZ,
  kThreadsX,
  kThreadsY,
  kThreadsZ,
  kBlockX,
  kBlockY,
  kBlockZ,
  kBlocksX,
  kBlocksY,
  kBlocksZ,
  kLane,
  kWarp,
  kLanesBelow,
  kLanesUpTo,
  kLanesEqual,
  kLanesFrom,
  kLanesAbove
};

struct Function {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> opcodes;                 // as written, by instruction
  std::vector<std::string> places;                  // of the source, "file:line"
  std::vector<uint8_t> widths;                      // bytes of each row
  std::vector<std::pair<int, uint64_t>> constants;  // rows that hold one value for ever
  std::vector<std::pair<int, Special>> specials;
  std::vector<std::array<int, 2>> params;  // offset, bytes
  int param_bytes = 0;
  int static_shared = 0;

  int rows() const { return static_cast<int>(widths.size()); }
  // "line 12 ld.global.f32 (attend.cuh:34)"
  std::string where(int pc) const;
};

using Module = std::map<std::string, Function>;  // by name

// Throws std::runtime_error with the line of what is not served.
Module parse(const std::string& text);

int bytes_of(Type type);  // of one element
bool is_signed(Type type);
bool is_float(Type type);

}  // namespace ptx
