// Minimax polynomials of the vector bodies, fitted for this project (linear programs; weighted least squares at
// Chebyshev nodes).
#pragma once

namespace specdec {

// 2^x on [0, 1], relative error 3.4e-6, exact at both ends and 3e-8 in the mean: the exponentials are what a pass over
// a row costs, and another degree would cost a tenth more. From the integer below x, since that is the one that AVX-512
// scales by.
constexpr float kExp2[5] = {1.0f, 6.930321209e-1f, 2.413797626e-1f, 5.203236948e-2f, 1.355574706e-2f};

// The same on [-1/2, 1/2], from the integer next to x, which AVX2 finds sooner: exact at both ends and at 0, relative
// error 4.0e-6, 6e-10 in the mean.
constexpr float kExp2Near[5] = {1.0f, 6.931135647e-1f, 2.402239371e-1f, 5.597286581e-2f, 9.667000000e-3f};

// (log(1 + x) - x + x^2 / 2) / x^3 on [-1/4, 1/2], relative error in the logarithm 4.9e-9.
constexpr float kLog1p[8] = {3.333344912e-1f, -2.500009583e-1f, 1.999086086e-1f, -1.664731234e-1f,
                             1.447840050e-1f, -1.316119653e-1f, 1.046299571e-1f, -4.507446709e-2f};

}  // namespace specdec
