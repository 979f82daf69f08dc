#include "cuda/decode.cuh"

template int ssd::cuda::start_decode<ssd::cuda::Float16, 0>(const DecodeParams&, const Launch&, void*);
template int ssd::cuda::start_decode<ssd::cuda::Float16, 64>(const DecodeParams&, const Launch&, void*);
template int ssd::cuda::start_decode<ssd::cuda::Float16, 128>(const DecodeParams&, const Launch&, void*);
