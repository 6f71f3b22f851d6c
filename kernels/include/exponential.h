// e^x for any kind of number S that has `shifted_left`: float on the host and on the device, and the lanes of `lanes.h`, for
// which it is included again for each instruction set. Included inside a namespace; includes nothing itself.

HFE_INLINE double exponential(double x) { return exp(x); }

// e^x for |x| <= 87, and NaN for NaN: 2^t = 2^n 2^r with a polynomial for 2^r. The relative error is below 2e-7 near 0
// and grows to 3e-6 at the ends, where no sigmoid feels it.
template <typename S>
HFE_INLINE S exponential(S x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  // Adding 1.5 * 2^23 rounds to an integer. With 127 added its last bits are, moved left, the exponent of 2^n.
  const S log2e = S(1.44269504f), shift = S(12583039.0f);
  const S shifted = x * log2e + shift, n = shifted - shift, r = x * log2e - n;
  // In pairs, so that the chain of dependent operations is short.
  const S square = r * r;
  const S high = S(1.3276471960e-3f) * r + S(9.6755415026e-3f);
  const S middle = S(5.5507132751e-2f) * r + S(2.4022119721e-1f);
  const S low = S(6.9314696706e-1f) * r + S(1.0000000717f);
  const S p = (high * square + middle) * square + low;
  return p * shifted_left(shifted, 23);
#endif
}
