// Stands in for the CUDA toolkit's header of this name: on the host the conversions are those of core/numeric.h.
#pragma once
