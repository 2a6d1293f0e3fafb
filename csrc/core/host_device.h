// What lets one header serve g++ (CPU kernels, one copy per instruction set) and nvcc (CUDA kernels).
#pragma once

// For a lambda, behind its parameters; and for functions of the host alone.
#define FL_INLINE __attribute__((always_inline))
#define FL_ALWAYS_INLINE inline __attribute__((always_inline))
// For what is called once per tile by many kernels: a copy in each only takes time to compile.
#define FL_NOINLINE __attribute__((noinline))

#ifdef __CUDACC__
#define FL_HD __host__ __device__ __forceinline__
#define FL_HD_NOINLINE __host__ __device__ __noinline__
#else
#define FL_HD FL_ALWAYS_INLINE
#define FL_HD_NOINLINE FL_NOINLINE
#endif

// Every header with code sits in this inline namespace, so that the AVX-512 copy of a template is never the one the
// linker keeps for the baseline.
#ifndef FL_ISA
#define FL_ISA baseline
#endif
