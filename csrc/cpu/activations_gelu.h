// GELU and its slope from tables in registers, for results that are rounded to bf16. Needs AVX-512, which looks up one
// of 32 floats for every lane in one instruction.
// Included only by files of csrc/cpu, which are compiled once per instruction set: everything has internal linkage.
//
// An exponential and a reciprocal form one long chain of dependent operations, and a core holds too few instructions to
// overlap the chains of several lines. Here |x| up to 5.8125 is divided into pieces of 0.1875 around 0, 0.1875, ...,
// each with a cubic in |x| for two functions, where p is the standard normal distribution function:
//   rest   |x| p(-|x|): gelu(x) = max(0, x) - rest. Relative error 1e-5 for |x| < 2, 3e-4 < 4, 2e-3 < 5.7; 0 beyond,
//          where it is 3e-8. Nowhere more than 9e-7, and 2e-7 from 2 on (torch's own error is 1e-7 |x|).
//   slope  of gelu at -|x|; at |x| it is 1 less that. Error 2e-6; from 2 on 2e-5, from 3 on 2e-4, from 4 on 2e-3 of it.
#pragma once

#include "vec.h"

#if defined(__AVX512F__)

namespace {

struct GeluTable {
  float coefficient[4][32];  // of rising powers of |x|, for every piece
};
alignas(64) constexpr GeluTable kGeluRest{{
    {0, -5.19113823e-05f, -0.000965286856f, -0.00374371346f, -0.00679878068f, -0.00390228169f, 0.0150483138f,
     0.0601883076f, 0.136444125f, 0.239644328f, 0.3561277f, 0.46623444f, 0.550181676f, 0.593839302f,
     0.592210492f, 0.549691916f, 0.477540264f, 0.389963202f, 0.300368679f, 0.218834651f, 0.15115001f,
     0.0991668863f, 0.0619010374f, 0.0368133102f, 0.0208836633f, 0.0113123777f, 0.00585652749f, 0.00290009154f,
     0.00137459433f, 0.000624023256f, 0.000271477192f, 0},
    {0.500001767f, 0.501328252f, 0.510948374f, 0.52885859f, 0.543226008f, 0.53353324f, 0.479079519f, 0.368560784f,
     0.206279337f, 0.0121654509f, -0.184111552f, -0.352164296f, -0.469321885f, -0.525573479f, -0.523962423f,
     -0.47728378f, -0.40295814f, -0.318116385f, -0.236231341f, -0.16571442f, -0.110162667f, -0.0695709445f,
     -0.0418205641f, -0.0239668266f, -0.0131117534f, -0.00685519717f, -0.00342843219f, -0.00164148806f,
     -0.000752922061f, -0.000331053205f, -0.000139609386f, 0},
    {-0.399275628f, -0.411078189f, -0.445533266f, -0.484282289f, -0.506866877f, -0.496076151f, -0.443855933f,
     -0.353573495f, -0.238371105f, -0.116595431f, -0.00630117361f, 0.0792286832f, 0.133747227f, 0.157912003f,
     0.157401504f, 0.140316601f, 0.114790555f, 0.0873890955f, 0.0624393972f, 0.0421074438f, 0.0269078717f,
     0.0163413053f, 0.00945249624f, 0.00521693707f, 0.00275106762f, 0.00138771424f, 0.000670230887f,
     0.000310185731f, 0.000137653769f, 5.86108437e-05f, 2.39559004e-05f, 0},
    {0.00939390312f, 0.0471330807f, 0.0891002231f, 0.117231972f, 0.129095971f, 0.125100315f, 0.108386678f,
     0.0837791496f, 0.0564986679f, 0.0310190837f, 0.0103503536f, -0.00416506007f, -0.0126242094f, -0.0160852144f,
     -0.0160345511f, -0.0139497605f, -0.0110270808f, -0.0080766693f, -0.00554233695f, -0.0035880149f,
     -0.00220160768f, -0.00128464535f, -0.000714564383f, -0.000379594284f, -0.0001928626f, -9.38274321e-05f,
     -4.37496762e-05f, -1.95668879e-05f, -8.3995169e-06f, -3.46268481e-06f, -1.37152452e-06f, 0},
}};
alignas(64) constexpr GeluTable kGeluSlope{{
    {0.500000009f, 0.500043807f, 0.501530069f, 0.510351411f, 0.53520614f, 0.581020683f, 0.641507601f, 0.69077318f,
     0.692581528f, 0.613599633f, 0.439051722f, 0.18184576f, -0.119436305f, -0.412636263f, -0.648484109f,
     -0.794459758f, -0.841522349f, -0.800980031f, -0.699451639f, -0.566760983f, -0.429381136f, -0.30576743f,
     -0.205467683f, -0.130678072f, -0.0788495242f, -0.0452238224f, -0.0246943039f, -0.0128548316f,
     -0.00638658013f, -0.00303128079f, -0.00137564875f, 0},
    {-0.797887246f, -0.798891911f, -0.813739678f, -0.868871108f, -0.981540233f, -1.14461927f, -1.32160177f,
     -1.44428057f, -1.44969161f, -1.30240759f, -1.00941124f, -0.617936292f, -0.19872839f, 0.176958125f,
     0.457055438f, 0.618730032f, 0.667814645f, 0.628868161f, 0.536276393f, 0.421635979f, 0.308954353f,
     0.212470954f, 0.137805558f, 0.0845943865f, 0.049283297f, 0.0273063477f, 0.0144136706f, 0.00725839964f,
     0.00349115961f, 0.00160542513f, 0.000706429855f, 0},
    {0.000122362201f, 0.00780859605f, 0.057958714f, 0.173525072f, 0.344321847f, 0.538203785f, 0.711057915f,
     0.812977891f, 0.817935548f, 0.726340832f, 0.562326143f, 0.363639661f, 0.169148231f, 0.00864615879f,
     -0.102261444f, -0.161959593f, -0.179025214f, -0.166553162f, -0.13840224f, -0.105383061f, -0.0745718127f,
     -0.0494668193f, -0.0309376285f, -0.0183170754f, -0.0102972643f, -0.00550907104f, -0.00281000655f,
     -0.00136847718f, -0.000637066262f, -0.000283777474f, -0.000121054265f, 0},
    {0.264435568f, 0.244309273f, 0.186924573f, 0.105651533f, 0.0190653314f, -0.0579216628f, -0.114272531f,
     -0.14252143f, -0.143961013f, -0.124964383f, -0.0943463289f, -0.0607203967f, -0.0306328954f, -0.00777013895f,
     0.00687145813f, 0.014220604f, 0.0161985071f, 0.0148670768f, 0.0120137699f, 0.00884328266f, 0.00603467174f,
     0.00385701647f, 0.00232412645f, 0.00132627038f, 0.000719075627f, 0.00037131207f, 0.000182951871f,
     8.61409195e-05f, 3.88038612e-05f, 1.67401213e-05f, 6.92173731e-06f, 0},
}};

// |x| up to the middle of the last piece, and in the low bits of `piece` its number: it rounds to 1.5 * 2^23 + that.
struct GeluPiece {
  vfloat size;
  vint piece;
};
inline GeluPiece gelu_piece(vfloat x) {
  const vfloat size = min(splat(5.8125f), absolute(x));
  return {size, _mm512_castps_si512(fma(size, splat(1 / 0.1875f), splat(12582912.0f)))};
}

inline vfloat from_table(const GeluTable& table, const GeluPiece& at) {
  const auto coefficient = [&](int i) {
    const float* c = table.coefficient[i];
    return _mm512_permutex2var_ps(load(c), at.piece, load(c + kLanes));
  };
  return fma(fma(fma(coefficient(3), at.size, coefficient(2)), at.size, coefficient(1)), at.size, coefficient(0));
}

inline vfloat gelu_value(vfloat x, const GeluPiece& at) {
  // max(0, x), but NaN for -infinity, as x p is: four bits for each kind of number, from the lowest on a quiet NaN, a
  // signalling one, 0, 1, -infinity, infinity, less than 0, more. 1: x, 2: x made quiet, 3: NaN, 8: 0.
  const vfloat positive = _mm512_fixupimm_ps(x, x, _mm512_set1_epi32(0x18131122), 0);
  return positive - from_table(kGeluRest, at);
}

inline vfloat gelu_slope(vfloat x, const GeluPiece& at) {
  const vfloat below = from_table(kGeluSlope, at);
  return _mm512_mask_sub_ps(below, _mm512_cmp_ps_mask(x, splat(0.0f), _CMP_GE_OQ), splat(1.0f), below);
}

}  // namespace

#endif
