// wgmma.mma_async.sp of sm_90a, one specialization for each type and number of tokens.
#pragma once
#include "common/types.cuh"

// "Asynchronous Warpgroup Level Matrix Instructions: wgmma.mma_async.sp": D[64, N] += A[64, k] * B[k, N]. A: 2:4 sparse, 32 stored bytes
// a row; B: dense, 64 bytes a column; both in shared memory, by matrix descriptors a, b. k = 64 for 8-bit types, 32 for 16-bit types.
// D: d[v] of thread t = D[16 (t / 32) + g + 8 (v >> 1 & 1), 8 (v >> 2) + 2 q + (v & 1)], with t % 32 = 4 g + q.
// e: metadata, as of mma.sp for the 16 rows of the warp; SELECTOR: which lane pair of a quad holds it (16-bit types only).
// add: 0 for D = A * B.
template <int TYPE, int N, int SELECTOR> struct WgmmaSp;
// D i: the accumulator's registers 0 to 8 i + 7, as text; DH: 0 to 3
#define DH "%0,%1,%2,%3"
#define D0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define D1 D0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define D2 D1 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define D3 D2 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define D4 D3 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define D5 D4 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define D6 D5 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define D7 D6 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define D8 D7 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define D9 D8 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define D10 D9 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define D11 D10 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define D12 D11 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define D13 D12 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define D14 D13 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define D15 D14 ",%120,%121,%122,%123,%124,%125,%126,%127"
// O i: the same registers as operands, with constraint C
#define OH(C) "+" C(d[0]), "+" C(d[1]), "+" C(d[2]), "+" C(d[3])
#define O0(C) "+" C(d[0]), "+" C(d[1]), "+" C(d[2]), "+" C(d[3]), "+" C(d[4]), "+" C(d[5]), "+" C(d[6]), "+" C(d[7])
#define O1(C) O0(C), "+" C(d[8]), "+" C(d[9]), "+" C(d[10]), "+" C(d[11]), "+" C(d[12]), "+" C(d[13]), "+" C(d[14]), "+" C(d[15])
#define O2(C) O1(C), "+" C(d[16]), "+" C(d[17]), "+" C(d[18]), "+" C(d[19]), "+" C(d[20]), "+" C(d[21]), "+" C(d[22]), "+" C(d[23])
#define O3(C) O2(C), "+" C(d[24]), "+" C(d[25]), "+" C(d[26]), "+" C(d[27]), "+" C(d[28]), "+" C(d[29]), "+" C(d[30]), "+" C(d[31])
#define O4(C) O3(C), "+" C(d[32]), "+" C(d[33]), "+" C(d[34]), "+" C(d[35]), "+" C(d[36]), "+" C(d[37]), "+" C(d[38]), "+" C(d[39])
#define O5(C) O4(C), "+" C(d[40]), "+" C(d[41]), "+" C(d[42]), "+" C(d[43]), "+" C(d[44]), "+" C(d[45]), "+" C(d[46]), "+" C(d[47])
#define O6(C) O5(C), "+" C(d[48]), "+" C(d[49]), "+" C(d[50]), "+" C(d[51]), "+" C(d[52]), "+" C(d[53]), "+" C(d[54]), "+" C(d[55])
#define O7(C) O6(C), "+" C(d[56]), "+" C(d[57]), "+" C(d[58]), "+" C(d[59]), "+" C(d[60]), "+" C(d[61]), "+" C(d[62]), "+" C(d[63])
#define O8(C) O7(C), "+" C(d[64]), "+" C(d[65]), "+" C(d[66]), "+" C(d[67]), "+" C(d[68]), "+" C(d[69]), "+" C(d[70]), "+" C(d[71])
#define O9(C) O8(C), "+" C(d[72]), "+" C(d[73]), "+" C(d[74]), "+" C(d[75]), "+" C(d[76]), "+" C(d[77]), "+" C(d[78]), "+" C(d[79])
#define O10(C) O9(C), "+" C(d[80]), "+" C(d[81]), "+" C(d[82]), "+" C(d[83]), "+" C(d[84]), "+" C(d[85]), "+" C(d[86]), "+" C(d[87])
#define O11(C) O10(C), "+" C(d[88]), "+" C(d[89]), "+" C(d[90]), "+" C(d[91]), "+" C(d[92]), "+" C(d[93]), "+" C(d[94]), "+" C(d[95])
#define O12(C) O11(C), "+" C(d[96]), "+" C(d[97]), "+" C(d[98]), "+" C(d[99]), "+" C(d[100]), "+" C(d[101]), "+" C(d[102]), "+" C(d[103])
#define O13(C) O12(C), "+" C(d[104]), "+" C(d[105]), "+" C(d[106]), "+" C(d[107]), "+" C(d[108]), "+" C(d[109]), "+" C(d[110]), "+" C(d[111])
#define O14(C) O13(C), "+" C(d[112]), "+" C(d[113]), "+" C(d[114]), "+" C(d[115]), "+" C(d[116]), "+" C(d[117]), "+" C(d[118]), "+" C(d[119])
#define O15(C) O14(C), "+" C(d[120]), "+" C(d[121]), "+" C(d[122]), "+" C(d[123]), "+" C(d[124]), "+" C(d[125]), "+" C(d[126]), "+" C(d[127])
#define WGMMA_SP(TYPE, N, SHAPE, TYPES, SELECTOR, SCALES, ACC, C, REGISTERS, OPERANDS, A, B, E, ADD)                          \
    template <> struct WgmmaSp<TYPE, N, SELECTOR> {                                                                          \
        static INLINE void mma(ACC (&d)[N / 2], u64 a, u64 b, u32 e, u32 add) {                                            \
            asm volatile("{.reg .pred add; setp.ne.b32 add, " ADD ", 0; "                                                  \
                         "wgmma.mma_async.sp.sync.aligned.m64n" #N SHAPE "." TYPES " {" REGISTERS "}, " A ", " B ", " E    \
                         ", " #SELECTOR ", add" SCALES ";}"                                                                \
                         : OPERANDS(C) : "l"(a), "l"(b), "r"(e), "r"(add));                                                \
        }                                                                                                                  \
    };
#define WGMMA_SP_TYPES(N, ...)                                                                                 \
    WGMMA_SP(TYPE_INT8, N, "k64", "s32.s8.s8", 0, "", int, "r", __VA_ARGS__)                                   \
    WGMMA_SP(TYPE_FLOAT8, N, "k64", "f32.e4m3.e4m3", 0, ", 1, 1", float, "f", __VA_ARGS__)                     \
    WGMMA_SP(TYPE_BFLOAT16, N, "k32", "f32.bf16.bf16", 0, ", 1, 1, 0, 0", float, "f", __VA_ARGS__)             \
    WGMMA_SP(TYPE_BFLOAT16, N, "k32", "f32.bf16.bf16", 1, ", 1, 1, 0, 0", float, "f", __VA_ARGS__)             \
    WGMMA_SP(TYPE_FLOAT16, N, "k32", "f32.f16.f16", 0, ", 1, 1, 0, 0", float, "f", __VA_ARGS__)                \
    WGMMA_SP(TYPE_FLOAT16, N, "k32", "f32.f16.f16", 1, ", 1, 1, 0, 0", float, "f", __VA_ARGS__)
WGMMA_SP_TYPES(8, DH, OH, "%4", "%5", "%6", "%7")
WGMMA_SP_TYPES(16, D0, O0, "%8", "%9", "%10", "%11")
WGMMA_SP_TYPES(32, D1, O1, "%16", "%17", "%18", "%19")
WGMMA_SP_TYPES(64, D3, O3, "%32", "%33", "%34", "%35")
WGMMA_SP_TYPES(96, D5, O5, "%48", "%49", "%50", "%51")
WGMMA_SP_TYPES(128, D7, O7, "%64", "%65", "%66", "%67")
WGMMA_SP_TYPES(144, D8, O8, "%72", "%73", "%74", "%75")
WGMMA_SP_TYPES(160, D9, O9, "%80", "%81", "%82", "%83")
WGMMA_SP_TYPES(176, D10, O10, "%88", "%89", "%90", "%91")
WGMMA_SP_TYPES(192, D11, O11, "%96", "%97", "%98", "%99")
WGMMA_SP_TYPES(208, D12, O12, "%104", "%105", "%106", "%107")
WGMMA_SP_TYPES(224, D13, O13, "%112", "%113", "%114", "%115")
WGMMA_SP_TYPES(240, D14, O14, "%120", "%121", "%122", "%123")
WGMMA_SP_TYPES(256, D15, O15, "%128", "%129", "%130", "%131")
