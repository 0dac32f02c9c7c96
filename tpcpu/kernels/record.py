"""The layout of what compiled code reads: the step, the records of operations, the segments of a linear.

All are arrays of int64 words; the names here are word numbers. Imports nothing, so that the code that fills them needs
no compiler.
"""

BLOCK = 64
"""Weights that share a scale."""

FORMATS = 7
NF4, NF4_SINGLE, INT8, BF16, F16, FLOAT32, MXFP4 = range(FORMATS)
"""Formats of packed weights. NF4_SINGLE has float32 scales, one per block, instead of doubly quantised ones; MXFP4 has
a power of two for each half of a block, the power in a byte."""

HALVES = 2
"""Halves of a block in MXFP4."""

FLOATS = (BF16, F16, FLOAT32)
"""Formats that always multiply float32 activations."""

RING = 16
"""Inputs of a convolution that a sequence keeps, by position modulo this: a token and the most drafts behind it."""

SPAN = 16
"""Blocks whose products are added in order into one sum; spans are added in order. It fixes the order of all sums."""

# The step: one per rank, the same memory every time.
TOKENS = 0
"""How many tokens the batch has."""
WANTED = 1
"""How many of them need logits."""
CLASS = 2
"""Which of a record's kernels to call: 0 for 1 token, 1 for 2 to 8, 2 for more."""
TOKEN_IDS = 3
"""From here on addresses of int32 arrays, one value a token: the token,"""
POSITIONS = 4
"""its position in its sequence,"""
SEQUENCES = 5
"""the row of its sequence in the batch,"""
FIRSTS = 6
"""the first token of its sequence in the batch."""
WANTED_IDS = 7
"""Tokens that need logits, in order."""
STATES = 8
"""One value a sequence of the batch: its place in the convolution states."""
PAGES = 9
"""One row a sequence of the batch: its pages of the cache."""
PAGES_STRIDE = 10
"""Bytes of such a row."""
PAGE_TOKENS = 11
"""Positions in a page, a multiple of 16."""
PIECES = 12
"""Pieces of 256 positions in the longest sequence of the batch."""
RUN = 13
"""From the team, so that RUN + NUMBER is larger in every record than in all that the team has walked before."""
TEAM = 14
"""Address of the team."""
STEP_WORDS = 16

# A record: header, then operands by kernel.
KERNELS = 0
"""Addresses of the kernels of the three classes of token counts."""
BARRIER = 3
"""Bit c: in steps of class c every thread must have finished before the next operation begins."""
STEP = 4
"""Address of the step."""
OPERANDS = 5
RECORD_WORDS = 56

# Operands of the kernels that go through activations feature by feature. Strides are bytes from token to token.
IN = 5
IN_STRIDE = 6
SECOND = 7
"""The other input: what is added, or the factor of a gated unit."""
SECOND_STRIDE = 8
OUT = 9
OUT_STRIDE = 10
WIDTH = 11
WEIGHT = 12
"""float32 of a norm."""
BIAS = 13
"""float32 that are added, or 0."""
EPS = 14
"""Bits of a float32."""
Q = 15
"""Where the result goes as int8 too, or 0; then its stride, scales, sums and their stride, as a linear's `X`."""
Q_STRIDE = 16
Q_SCALES = 17
Q_SUMS = 18
Q_SCALES_STRIDE = 19
TOTAL = 20
"""Where x + y + bias goes, when a norm follows in the same kernel."""
TOTAL_STRIDE = 21
ELEMENT = 22
"""The format of stored values: BF16, F16 or FLOAT32."""
STATE = 23
"""float32 inputs of a convolution: `RING` rows a sequence, by position modulo `RING`,"""
STATE_STRIDE = 24
"""bytes from one row to the next,"""
STATE_PAGES = 26
"""and such rows for pages of the cache, one each: the input at the page's last position."""
PARTS = 25
"""How many partial sums lie behind each other."""
ROW = 27
"""float32 copies of the result of a step of one token, one row a thread, or 0."""
ROW_STRIDE = 28
IN_ROW = 29
"""Where such copies of `IN` lie, or 0, with `IN_ROW_STRIDE`."""
IN_ROW_STRIDE = 30
CONSTANT = 31
"""Bits of a float32: what an embedding is multiplied by, or what logits are held below."""
ACTIVATION = 32
"""What a gate goes through: SILU, GELU_TANH or CLAMPED, which has `LIMIT` and `SHARPNESS`."""
SILU, GELU_TANH, CLAMPED = 0, 1, 2
GATE = 33
"""One float32 a token, whose sigmoid is what `SECOND` is multiplied with before it is added."""
GATE_STRIDE = 34
THIRD = 35
"""A third input, where there is one."""
THIRD_STRIDE = 36
LIMIT = 37
"""Bits of float32: what a gate is no more than, and the other within on both sides,"""
SHARPNESS = 38
"""and the factor of the gate inside its sigmoid."""

# Operands of an exchange.
SEND = 5
RECEIVE = 6
ROW_FLOATS = 7
"""float32 of one token in the message."""
FUNCTION = 8
"""Address of the MPI function, then its handles."""
DATATYPE = 9
OPERATION = 10
COMMUNICATOR = 11
STATUS = 12
"""Written: what the MPI function returned, 0 for success."""

# Operands of an exchange through the window. The part of this rank is `IN`, or lies in the window already; what is
# added to the sum is `SECOND` and `BIAS`; the result goes to `OUT`; all have `WIDTH` features.
DIRECT = 14
"""1 if the part of one token has been written to the window by whoever made it."""
HALF = 15
"""0 or 1: which half of the data this message begins with; the next one begins with the other."""
PLACE = 16
"""Where in the half, in bytes."""
WINDOW = 17
"""Address of the window's table."""
TWO_SHOT = 18
"""Bytes of a message from which on the ranks divide the adding."""

# Further operands of an exchange between hosts, behind those through the window.
SLICE = 19
"""The slice of the message that this rank exchanges with other hosts; none if it is not below `SLICES`."""
SLICES = 20
HOSTS = 21
SUMS = 22
"""float32 sums of this host: tokens, each of whole blocks, behind one another,"""
ROUNDED = 23
"""and as bf16, if they travel so (`IS_ROUNDED`)."""
IS_ROUNDED = 24
RECEIVED = 25
"""This rank's slice of all hosts, in host order."""
WIRE_FUNCTION = 26
"""Address of MPI_Allgather, then its handles."""
WIRE_DATATYPE = 27
WIRE_COMMUNICATOR = 28

# Operands of attention; heads are rows of `HEAD_STEP` bytes from `HEAD_FIRST`.
A_Q = 5
A_Q_STRIDE = 6
A_Q_FIRST = 7
A_Q_STEP = 8
A_Q_HEADS = 9
A_K = 10
A_K_STRIDE = 11
A_K_FIRST = 12
A_K_STEP = 13
A_KV_HEADS = 14
A_V = 15
A_V_STRIDE = 16
A_V_FIRST = 17
A_V_STEP = 18
A_DIM = 19
A_OUT = 20
A_OUT_STRIDE = 21
A_COS = 22
"""float32 (positions, rotated dimensions / 2), then the sines."""
A_SIN = 23
A_KEYS = 24
"""Pages of keys: heads x tiles of 16 positions x dim x 16; of values: heads x tiles x 16 x dim. Of int8, each tile is
followed by 16 float32: what a step of each position is worth."""
A_VALUES = 25
A_PAGE_BYTES = 26
A_GROUPS = 27
"""int32: query heads in the order of their key/value heads, here called slots. First, for each key/value head and for
one more, the slot where its group begins; then the query head of each slot."""
A_SCALE = 28
"""Bits of a float32."""
A_PARTS = 29
"""Sums of pieces, a row each of tokens x slots x pieces: weighted values, the maximum, the sum of weights."""
A_PART_TOKENS = 30
"""Pieces that there is room for, of each token and head."""
A_SCRATCH = 31
"""Memory of each thread, `attention.scratch_bytes`, and the bytes from one to the next."""
A_SCRATCH_STRIDE = 32
A_ROTATED = 33
"""Rotated queries of several tokens, head after head."""
A_ROTATED_STRIDE = 34
A_WINDOW = 35
"""How many positions a token sees, its own included; 0: all."""
A_TURNED = 36
"""Dimensions of a head that are rotated, the first ones,"""
A_INTERLEAVED = 37
"""1: in pairs of neighbours; 0: those of the first half with those of the second."""
A_Q_NORM = 38
"""float32 of the norm of each query head, or 0,"""
A_K_NORM = 39
"""and of each key head; with `A_EPS`, bits of a float32."""
A_EPS = 40
A_CAP = 41
"""Bits of a float32 that scores are held below, or 0."""
A_SLOPES = 42
"""float32 numbers from 0 to 255, then what each query head's scores lose with every position back; 0: nothing."""
A_SINKS = 43
"""float32, one more score of each query head, of a position that has no value; 0: none."""
A_VALUE_DIM = 44
"""Dimensions of a value."""

# Where values are the first dimensions of the one key of all heads, its tiles are position by position like those of
# values, and there are no others. What is rotated comes from elsewhere than the rest of a row.
A_Q_TURNED = 45
"""What is rotated of the first query head, then bytes from token to token and from head to head."""
A_Q_TURNED_STRIDE = 46
A_Q_TURNED_STEP = 47
A_K_TURNED = 48
"""What is rotated of the key, then bytes from token to token."""
A_K_TURNED_STRIDE = 49

# Operands of a linear.
X = 5
"""Activations: int8, or float32 in exact arithmetic; then bytes from one token to the next."""
X_STRIDE = 6
X_SCALES = 7
"""float32, one per 64 activations."""
X_SUMS = 8
"""int32, one per 64 activations: minus the bias of the weights times their sum."""
X_SCALES_STRIDE = 9
SEGMENTS = 10
SEGMENT_COUNT = 11
PANELS = 12
"""Panels of all segments together; threads divide these."""
COUNT = 13
"""Address of the number of tokens."""
TABLE = 14
"""The 16 values of the codes: bytes, repeated over a register, or float32."""
FACTOR = 15
"""Bits of a float32 that every product is multiplied with."""
SCRATCH = 16
"""Memory, `SCRATCH_STRIDE` bytes a thread: for a decoded row (plain kernels), for the sums of spans (the others)."""
SCRATCH_STRIDE = 17
NUMBER = 18
"""Which record of the program this is."""
X_ONE = 19
"""Where the activations of a step of one token lie,"""
IS_PRIVATE = 20
"""and whether every thread has a copy of its own there, one row of `X`, `X_SCALES` and `X_SUMS` after another."""
ROOM = 21
"""Memory of each thread for products with many tokens, `gemm.room_bytes`, and the bytes from one to the next."""
ROOM_STRIDE = 22

# Operands of a product by heads, beside those of a linear: one segment, of whose rows each head has its own.
H_HEADS = 23
H_X_STEP = 24
"""Bytes of activations from head to head; they are float32."""
H_ROWS = 25
"""Rows of a head, the first one's first row, and rows from head to head."""
H_FIRST = 26
H_STEP = 27
H_OUT = 28
"""The result of the first head, then bytes from token to token and from head to head."""
H_OUT_STRIDE = 29
H_OUT_STEP = 30

# Operands of a mixture of experts. A token and an expert that it chose are a pair; pairs of several tokens lie by
# expert. A product has the operands of a linear too, and puts its segments together as it runs.
E_TOP = 23
"""Experts of a token."""
E_CHOICE = 24
"""float32 of each token: the numbers of its experts, then their weights; and bytes from one token to the next."""
E_CHOICE_STRIDE = 25
E_CHOICE_ONE = 26
"""The same of a step of one token, of which every thread has a copy."""
E_NORMALISED = 27
"""1 if the weights of a token's experts add up to 1."""
E_EXPERTS = 28
"""How many there are."""
E_STARTS = 29
"""int32: for each expert, and for one more, the first of its pairs;"""
E_PAIRS = 30
"""for each pair the token; and for each token and place among its experts the pair."""
E_NUMBERS = 31
E_SEGMENTS = 32
"""Segments of all experts, `E_PARTS` of each."""
E_PARTS = 33
E_OWN = 34
"""Memory of each thread, `experts.own_bytes`, and the bytes from one to the next."""
E_OWN_STRIDE = 35
E_X = 36
"""Activations of the pairs of several tokens, in the strides of a linear's `X`; then their scales and sums."""
E_X_SCALES = 37
E_X_SUMS = 38
E_PANEL_BYTES = 39
"""Bytes of a panel's values, then of its scales."""
E_SCALES_BYTES = 40
E_APART = 41
"""1 if the pairs of one token have activations of their own, too: of each thread `E_TOP` rows of `X_ONE`."""
E_KERNELS = 42
"""Addresses of the kernels that multiply, as in `KERNELS`."""
E_FIRST = 45
"""Of what an expert's `down` multiplies: the first own column, and all columns in whole blocks."""
E_COLUMNS = 46

# Further operands of the choice of experts; what is added to p is `BIAS`.
T_SIGMOID = 32
"""1: p is the sigmoid of a score; 0: softmax over all."""
T_GROUPS = 33
"""Groups of experts, how many of them are kept, and of how many experts of each the sum is compared."""
T_TOP_GROUPS = 34
T_GROUP_BEST = 35
T_FACTOR = 36
"""Bits of a float32 that weights are multiplied with."""
T_OWN = 37
"""Memory of each thread, `experts.choice_bytes`, and the bytes from one to the next."""
T_OWN_STRIDE = 38

# A segment of a linear.
S_VALUES = 0
"""Packed weights, panel by panel."""
S_SCALES = 1
"""Scale codes or powers (uint8) or scales (float32), block by block, the rows of a panel together."""
S_GROUPS = 2
"""float32 scales of groups of 256 scale codes, addressed by the number of the group in the whole tensor."""
S_CODE = 3
"""float32 values of the 256 scale codes."""
S_OFFSET = 4
"""Bits of the float32 that is added to every scale."""
S_ROWS = 5
S_PANELS = 6
S_COLUMNS = 7
S_FULL_BLOCKS = 8
"""Blocks in a row of the whole tensor."""
S_FIRST_BLOCK = 9
"""The number, in the whole tensor, of the first block of the first row."""
S_OUT = 10
S_OUT_STRIDE = 11
S_BIAS = 12
"""float32, one per row, or 0."""
S_OUT_ONE = 13
"""Where the result of a step of one token goes."""
S_ROW_ONE = 14
"""Of a step of one token, which row of `X_ONE` is multiplied, beside what a private copy adds."""
SEGMENT_WORDS = 16

# The task of a thread in a product with many tokens: some blocks of a span of one or two panels.
G_WEIGHTS = 0
"""Words of the first block and panel, then bytes from panel to panel; the same of the scales."""
G_WEIGHTS_STRIDE = 1
G_SCALES = 2
G_SCALES_STRIDE = 3
G_BLOCKS = 4
G_X = 5
"""The first block of the tokens that lie side by side; then of their scales and of their sums."""
G_X_SCALES = 6
G_X_SUMS = 7
G_TOKENS = 8
"""How many there are."""
G_CARRY = 9
"""Sums of the span, tile after tile, where blocks come before these (`G_RESUMES`) or follow them (not `G_ENDS`)."""
G_RESUMES = 10
G_ENDS = 11
G_OUT = 12
"""The result of the first token and row; then bytes from token to token."""
G_OUT_STRIDE = 13
G_ROWS = 14
"""Rows from the first one on."""
G_BEGINS = 15
"""1 in the first span, before which there is no result."""
G_BIAS = 16
"""In the last span the bias of the first row, or 0."""
G_X_HALVES = 17
"""Bytes from the sums of the first halves of blocks, where these have scales of their own, to those of the second."""
TASK_WORDS = 24

# Operands of packing.
P_SOURCE = 5
"""The first element, in the published layout; then bytes from row to row."""
P_ROW_BYTES = 6
P_ROWS = 7
P_COLUMNS = 8
P_OUT = 9
P_MAPPED = 10
"""1 if the source is a mapped file, whose pages are to be mapped ahead and given back."""

# Operands of filling with random contents.
N_OUT = 5
"""Where; the memory is `N_UNITS` panels of `N_UNIT_BYTES`, a multiple of 8."""
N_UNITS = 6
N_UNIT_BYTES = 7
N_SEED = 8
N_SET = 9
"""Bits that every word of 8 bytes has set."""
N_KEPT = 12
"""Of random bytes the bits of every word that are random."""
N_MIDDLE = 10
"""Bits of a float32: the middle of what floats are drawn from,"""
N_SPREAD = 11
"""and how far they go to either side."""

# Operands of reading for the sake of reading.
M_SOURCE = 5
"""The memory, and its bytes."""
M_BYTES = 6
M_PASSES = 7
"""How many times it is read."""
M_DISTANCE = 8
"""How many bytes ahead is prefetched."""
M_SUMS = 9
"""One cache line a thread: the sum of all int32 read."""

# Operands of the loops that stay in registers.
O_ROUNDS = 5
O_SINK = 6
"""One cache line a thread, for a result that nobody needs."""
