// Minimax polynomials of the vector bodies, fitted for this project (Remez; weighted least squares at Chebyshev nodes).
#pragma once

namespace specdec {

// 2^x on [0, 1], relative error 2.6e-6: the exponentials are what a pass over a row costs, and another degree would
// cost a tenth more. From the integer below, since that is the one that AVX-512 scales by.
constexpr float kExp2[5] = {1.000002593e0f, 6.930038345e-1f, 2.414427569e-1f, 5.201146061e-2f, 1.353416792e-2f};

// (log(1 + x) - x + x^2 / 2) / x^3 on [-1/4, 1/2], relative error in the logarithm 4.9e-9.
constexpr float kLog1p[8] = {3.333344912e-1f, -2.500009583e-1f, 1.999086086e-1f, -1.664731234e-1f,
                             1.447840050e-1f, -1.316119653e-1f, 1.046299571e-1f, -4.507446709e-2f};

}  // namespace specdec
