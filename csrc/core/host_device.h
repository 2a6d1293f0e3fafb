// What lets one header serve g++ (CPU kernels, one copy per instruction set) and nvcc (CUDA kernels).
#pragma once

// For a lambda, behind its parameters.
#define FL_INLINE __attribute__((always_inline))

#ifdef __CUDACC__
#define FL_HD __host__ __device__ __forceinline__
#else
#define FL_HD inline __attribute__((always_inline))
#endif

// Every header with code sits in this inline namespace, so that the AVX-512 copy of a template is never the one the
// linker keeps for the baseline.
#ifndef FL_ISA
#define FL_ISA baseline
#endif
