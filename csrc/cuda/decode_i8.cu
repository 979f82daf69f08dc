#include "cuda/decode.cuh"

template int ssd::cuda::start_decode<ssd::cuda::Int8, 0>(const DecodeParams&, const Launch&, void*);
template int ssd::cuda::start_decode<ssd::cuda::Int8, 64>(const DecodeParams&, const Launch&, void*);
template int ssd::cuda::start_decode<ssd::cuda::Int8, 128>(const DecodeParams&, const Launch&, void*);
