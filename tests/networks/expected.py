"""What may be pruned in each network of the zoo, worked out by hand.

The note gives each coupled set as `size: its axes`, then the leaves of which no slice is in a
prunable set. "o" is a layer's output axis (with bias and batch norm), "i" its input axis; "all
but" lists what makes up the difference between the two numbers of the share.
"""

from fractions import Fraction
from typing import NamedTuple


class Expected(NamedTuple):
    sizes: list[int]  # channels of each coupled set, sorted
    share: Fraction  # of the elements of all leaves, those in a prunable slice
    note: str


EXPECTED = {
    "hand_written": Expected(
        [16],
        Fraction(1200, 1210),  # 64*16 + 16 + 16*10 + 10
        "16: hidden o, out i. All but out/bias 10.",
    ),
    "linen": Expected(
        [4],
        Fraction(2616, 2626),  # conv1 36 + 4, norm1 4*4, dense1 256*10 + 10
        "4: conv1 o, norm1, 64 rows each of dense1 i. All but dense1/bias 10.",
    ),
    "mlp": Expected(
        [16, 16],
        Fraction(1472, 1482),  # 64*16 + 16, 16*16 + 16, 16*10 + 10
        "16: dense1 o, dense2 i. 16: dense2 o, classifier i. All but classifier/bias 10.",
    ),
    "convnet": Expected(
        [10, 20, 50],
        Fraction(21830, 21840),  # 250 + 10, 5000 + 20, 320*50 + 50, 500 + 10
        "10: conv1 o, conv2 i. 20: conv2 o, 16 rows each of dense1 i. 50: dense1 o, "
        "classifier i. All but classifier/bias 10.",
    ),
    "separable": Expected(
        [8, 16, 50],
        Fraction(13910, 13920),  # 208, depthwise 208, pointwise 144, 256*50 + 50, 510
        "8: conv1 o, depthwise o, pointwise i. 16: pointwise o, 16 rows each of dense1 i. "
        "50: dense1 o, classifier i. All but classifier/bias 10.",
    ),
    "resnet20": Expected(
        [16] * 5 + [32] * 4 + [64] * 3,
        # convolutions 432 + 6*2304 + 4608 + 5*9216 + 18432 + 5*36864, norms
        # 4*(7*16 + 6*32 + 6*64), classifier 650
        Fraction(271088, 271098),
        "Inside the blocks 3 of 16, 3 of 32, 3 of 64. The shortcuts append zero channels, so the "
        "first 16 of all three stages are one set, the 16 that start in stage two another (up to "
        "stage three), the 32 that start in stage three a third. All but classifier/bias 10.",
    ),
    "mobilenet": Expected(
        [8] * 3 + [16, 24, 40] + [48] * 6 + [80] + [96] * 4 + [144] * 3 + [240] * 3 + [1280],
        # convolutions 216 + 136 + 5*1200 + 1584 + 3*3936 + 4704 + 2*8208 + 10512 + 2*21360
        # + 30960 + 102400, norms 4*5328, classifier 12810
        Fraction(261568, 261578),
        "Streams 8 (conv1; block 0 has no expansion and is residual, so its depthwise o and both "
        "axes of its project are in it), 8 (blocks 1-2), 8 (3-5), 16 (6-9), 24 (10-12), "
        "40 (13-15), 80 (16), 1280 (conv2). Inner 48 (blocks 1-6), 96 (7-10), 144 (11-13), "
        "240 (14-16). All but classifier/bias 10.",
    ),
    "unet": Expected(
        [4, 5, 6, 7, 8, 9, 10],
        # 124, 240, 580, raise2 205, up2 721, raise1 232, up1 1008, out 20
        Fraction(3128, 3130),
        "4: down1 o, down2 i, up1 i from 8. 6: down2 o, bottom i, up2 i from 5. 10: bottom o, "
        "raise2 i. 5: raise2 o, up2 i to 5. 7: up2 o, raise1 i. 8: raise1 o, up1 i to 8. "
        "9: up1 o, out i. All but out/bias 2.",
    ),
    "densenet": Expected(
        [4, 4, 4, 8, 10],
        # stem 216, convs 288 + 432 + 576, transition 200, norms 4*(8 + 12 + 16 + 20 + 10), head 66
        Fraction(2036, 2042),
        "8: stem o, norms 0-3, convs 0-2 i, transition i. 4: convs 0 o, norms 1-3, convs 1-2 i, "
        "transition i; 4 and 4 likewise, each a norm and a convolution shorter. 10: transition "
        "o, last_norm, head i. All but head/bias 6.",
    ),
    "inception": Expected(
        [4, 5, 6, 7, 8, 9, 10, 11],
        # stem 186, one 28, three 35 + 322, five 56 + 1809, pool 70, merge 2981, head 24
        Fraction(5509, 5511),
        "6: stem o, i of one, three/0, five/0 and pool. 5: three/0 o, three/1 i. 8: five/0 o, "
        "five/1 i. 4, 7, 9, 10: o of the branches, their piece of merge i. 11: merge o, head i. "
        "All but head/bias 2.",
    ),
    "shuffle_unit": Expected(
        [6, 6, 6, 7, 9],
        # stem 372, expand 70, depthwise 91, project 66, last 144, head 50
        Fraction(788, 793),
        "6: stem o 0-5, last i 2j. 6: stem o 6-11, expand i. 6: project o, last i 2j+1. "
        "7: expand o, depthwise o, project i. 9: last o, head i. All but head/bias 5.",
    ),
    "shuffle_twice": Expected(
        [3, 3, 3, 3, 6, 6, 7, 8, 9],
        # as shuffle_unit, and the second unit's expand 80, depthwise 104, project 72
        Fraction(1044, 1049),
        "Unit 1 keeps 0-5, which are stem 0-2 and project 0 o 0-2 by turns, and reads 6-11. "
        "3 + 3: stem o 0-2 and project 0 o 0-2, each with last i. 3 + 3: stem o 3-5 and project 0 "
        "o 3-5, each with expand 1 i. 6: stem o 6-11, expand 0 i. 6: project 1 o, last i. 7, 8: "
        "inside the units. 9: last o, head i. All but head/bias 5.",
    ),
    "squeeze_excite": Expected(
        [4, 8, 12],
        Fraction(1296, 1301),  # stem 248, conv 876, squeeze 52, excite 60, head 65
        "8: stem o, conv i. 12: conv o, squeeze i, excite o, head i. 4: squeeze o, excite i. "
        "All but head/bias 5.",
    ),
    "grouped": Expected(
        [4, 6, 8],
        Fraction(1664, 1669),  # stem 248, reduce 192, grouped 960, project 224, head 45
        "8: stem o, reduce i, project o, head i. 4: reduce o at j, j+4, j+8, j+12, grouped i. "
        "6: grouped o at j, j+6, j+12, j+18, project i likewise. All but head/bias 5.",
    ),
    "multiplier": Expected(
        [5, 7],
        Fraction(360, 364),  # stem 155, depthwise 100, pointwise 77, head 32
        "5: stem o, depthwise o and pointwise i at 2i, 2i+1. 7: pointwise o, head i. "
        "All but head/bias 4.",
    ),
    "chain": Expected(
        [6, 9, 10, 11, 12],
        # stem 162, shortcut 72, first 486 + 1080 + 1188, second 972 + 1080 + 1188, norms 4*84,
        # head 65
        Fraction(6624, 6629),
        "6: stem o, shortcut i, first/0 i. 12: shortcut o, o of all second, i of first/1, first/2 "
        "and head. 9, 10, 11: first o, second i. All but head/bias 5.",
    ),
    "flatten": Expected(
        [4, 6, 9],
        Fraction(712, 717),  # conv1 112, conv2 222, hidden 333, head 50
        "4: conv1 o, conv2 i. 6: conv2 o, 6 rows each of hidden i. 9: hidden o, head i. "
        "All but head/bias 5.",
    ),
    "group_norm": Expected(
        [3, 5],
        Fraction(1510, 1514),  # conv1 336, conv2 1090, norms 24 + 20, head 44
        "3: conv1 o, norm1, conv2 i at j, j+3, j+6, j+9: the place in a group stays free, the "
        "group is pinned. 5: conv2 o, norm2, head i at j, j+5. All but head/bias 4. Ambiguous: "
        "jnp.repeat of the mean is broadcast (4, 3) and reshape (12), so the axis that the "
        "broadcast makes must be free; the mean divides by the traced count.",
    ),
    "tied": Expected(
        [8],
        Fraction(336, 341),  # stem 224, shared 72, head 45
        "8: stem o, both axes of shared/kernel, shared/bias, head i. All but head/bias 5.",
    ),
    "nchw": Expected(
        [6, 9],
        Fraction(747, 751),  # stem 162 + 6, expand 486 + 9, project 54, layer_scale 6, head 28
        "6: stem o, expand i, project o, layer_scale, head i. 9: expand o, project i. "
        "All but head_bias 4.",
    ),
    "vit": Expected(
        [2, 3, 5, 5, 7, 7, 12, 16, 20],
        # patches 588, token 12, position 60, block 0 390 + 132 + 48 + 208 + 204, block 1
        # 819 + 264 + 48 + 260 + 252, norm 24, head 52
        Fraction(3357, 3361),
        "12: the residual stream, with token, position and every norm. Block 0: 2 heads, 5 of "
        "query and key depth, 5 of value depth, 16 hidden; block 1: 3, 7, 7, 20. All but "
        "head/bias 4. Means and 1/sqrt(depth) keep the traced count.",
    ),
    "fused_qkv": Expected(
        [4, 10, 12],
        # embed 480, position 40, scale 10, bias 10, qkv 264, out 90, up 132, down 120, head 33
        Fraction(1176, 1179),
        "10: the residual stream. 4: depth, the last factor of (3, 2, 4): qkv o at j, j+4, ... "
        "(6 columns), out i at j, j+4. 12: up o, down i. All but head_bias 3. Ambiguous: the "
        "heads (2) could be the free factor instead; the rule says the last.",
    ),
    "elman": Expected(
        [7],
        Fraction(112, 115),  # inputs 35, hidden 49, bias 7, head 24
        "7: inputs o, both axes of hidden, bias, head i. All but head_bias 3.",
    ),
    "lstm": Expected(
        [6],
        Fraction(282, 285),  # dense_i 96, dense_h 144 + 24, head 21
        "6: dense_i and dense_h o at the four gates, dense_h i, head i. All but head/bias 3.",
    ),
    "gru": Expected(
        [9],
        Fraction(405, 408),  # dense_i 108 + 27, dense_h 243, head 30
        "9: dense_i and dense_h o at the three gates, dense_h i, head i. All but head/bias 3.",
    ),
    "stacked": Expected(
        [6, 24],
        Fraction(996, 998),  # embed 30, up 432 + 72, down 432, bias 18, head 14
        "6: embed o, up axis 1, down axis 2, bias axis 1, head i. 24: up axis 2, up_bias axis 1, "
        "down axis 1. All but head_bias 2. The scanned axis (3) is pinned: ambiguous, as a layer "
        "of zeros is the identity here; the share is the same either way.",
    ),
    "gated": Expected(
        [8, 12],
        Fraction(376, 379),  # embed 40, gate 108, value 108, out 96, head 27
        "8: embed o, gate i, value i, out o, head i. 12: gate o, value o, out i. "
        "All but head_bias 3.",
    ),
    "linear_attention": Expected(
        [7, 8],
        # embed 40, query 32 + 4, key 32 + 4, value 56 + 7, out 56, head 27
        Fraction(247, 258),
        "8: embed o, i of query, key, value, out o, head i. 7: value o, out i. The depth of query "
        "and key (4) is pinned: elu(0) + 1 is not zero. All but query_bias 4, key_bias 4, "
        "head_bias 3.",
    ),
    "two_pass": Expected(
        [11],
        Fraction(132, 199),  # hidden 88 + 11 and head 33, of these, head_bias 3 and 64
        "11: hidden o, head i. The 8 are pinned: (x - mean)^2 is summed and is not zero. Left: "
        "embed 40, embed_bias 8, scale 8, bias 8, head_bias 3.",
    ),
    "linen_plain": Expected(
        [5],
        Fraction(175, 179),  # Conv_0 135, BatchNorm_0 20, Dense_0 24
        "5: Conv_0 o, Dense_0 i. All but Dense_0/bias 4.",
    ),
    "linen_residual": Expected(
        [6, 8],
        Fraction(2642, 2646),  # convolutions 162 + 432 + 432, norms 4*20, Dense_0 384*4 + 4
        "6: Conv_0 o, Conv_1 i, Conv_2 o, 64 rows each of Dense_0 i. 8: Conv_1 o, Conv_2 i. "
        "All but Dense_0/bias 4.",
    ),
    "haiku": Expected(
        [6, 9],
        Fraction(1242, 1246),  # convolutions 162 + 486 + 486, norms 4*21, linear 28
        "6: conv2_d o, conv2_d_1 i, conv2_d_2 o, linear i. 9: conv2_d_1 o, conv2_d_2 i. "
        "All but linear/b 4.",
    ),
    "haiku_state": Expected(
        [6, 9],
        Fraction(1242, 1294),  # as haiku, and hidden 2*21, counter 6
        "As haiku. All but linear/b 4, hidden 42, counter 6. Ambiguous: inference reads neither "
        "hidden nor counter; taken as not prunable. Were unread leaves free, each hidden would be "
        "a set of its own (6, 6, 6, 6, 9, 9 more) and the share 1284/1294.",
    ),
    "equinox": Expected(
        [6, 9],
        Fraction(1263, 1267),  # convolutions 168 + 495 + 492, norms 42, statistics 42, head 28
        "6: convs 0 o, convs 1 i, convs 2 o, head i (axis 1). 9: convs 1 o, convs 2 i. "
        "All but head bias 4.",
    ),
    "keras": Expected(
        [6, 9],
        Fraction(369, 373),  # conv2d 168, norms 48, depthwise 54, conv2d_1 63, dense 40
        "6: conv2d o, both norms, depthwise axis 2 (its axis 3 is the multiplier, 1), conv2d_1 i. "
        "9: conv2d_1 o, dense i. All but dense/bias 4.",
    ),
}
