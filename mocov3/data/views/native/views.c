/* Augmented views in one call: crop, antialiased resize, flip, colour jitter, grey, blur, solarise.

   The operations are Pillow's (triangle filter, blends of the enhancers, its HSV, Gaussian blur by three box blurs),
   arranged so that a compiler turns every loop into vector instructions: planes instead of interleaved pixels, 16-bit
   fixed point where Pillow keeps 8 bits between passes, no branches in loops. Integer arithmetic and float arithmetic
   without contraction give the same pixels on every machine. Loaded by ctypes (mocov3/data/views/native/__init__.py): needs
   no Python header. Where it cannot be built, mocov3/data/views/operations.py does the same by OpenCV and
   Pillow. One file, longer than the house's others, so that the compiler makes both versions of a loop with all inlined. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
#error "written for GCC and clang; without them the package uses OpenCV and Pillow"
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx2", "default"))) /* chosen when loaded, by the processor */
#else
#define FAST
#endif
#define INLINE static inline __attribute__((always_inline))
#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

enum {
    BLOCK = 16,  /* rows that are resized together */
    REACH = 128, /* a blur reaches less far */
};

INLINE int rounded_up(int n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }
INLINE uint16_t high(uint32_t a, uint32_t b) { return (uint16_t)((uint16_t)a * (uint32_t)(uint16_t)b >> 16); }
INLINE uint16_t plus(uint16_t a, uint16_t b) { return (uint16_t)(a + b); }
INLINE int smaller(int a, int b) { return a < b ? a : b; }

/* --- resize ------------------------------------------------------------------------------------------------- */

typedef struct {
    int taps;         /* room for this many weights an output pixel */
    int *start, *count;
    uint16_t *weight; /* 0.16 fixed point; those of an output pixel sum to 65535 */
} Axis;

static int taps_of(double extent, int out) { return 2 * (int)ceil(extent > out ? extent / out : 1.0) + 2; }

INLINE double falling(double distance, double slope) {
    double w = 1 - fabs(distance) * slope;
    return w > 0 ? w : 0;
}

/* Pillow's triangle filter, widened by the scale where the image shrinks: `out` pixels from `extent` input pixels that
   begin at `begin`, which may be fractions; no pixel outside 0 … in − 1 is touched. */
static void fill_axis(Axis *axis, int in, double begin, double extent, int out) {
    double scale = extent / out, support = scale > 1 ? scale : 1, slope = 1 / support;
    for (int i = 0; i < out; i++) {
        double centre = begin + (i + 0.5) * scale - 0.5, sum = 0, passed = 0;
        int low = (int)(centre - support + 1), end = (int)(centre + support + 1), before = 0;
        if (centre - support + 1 < 0) low = 0;
        if (end > in) end = in;
        if (low >= end) low = smaller(low, in - 1), end = low + 1; /* a sliver at the edge */
        axis->start[i] = low;
        axis->count[i] = end - low;
        uint16_t *weight = axis->weight + (ptrdiff_t)i * axis->taps;
        for (int j = low; j < end; j++) sum += falling(j - centre, slope);
        if (!(sum > 0)) { /* only a sliver: its one pixel */
            weight[0] = 65535;
            continue;
        }
        sum = 65535 / sum;
        for (int j = low; j < end; j++) { /* differences of the rounded running sum: the parts sum to the whole */
            passed += falling(j - centre, slope);
            int now = (int)(passed * sum + 0.5);
            weight[j - low] = (uint16_t)(now - before);
            before = now;
        }
    }
}

/* Half a unit a product makes good for what `high` cuts off; bounded, so that white cannot overflow. */
INLINE uint16_t lift(int products) { return (uint16_t)smaller(products / 2, 48); }

INLINE void add_rows(uint16_t *restrict to, const uint8_t *restrict s, ptrdiff_t stride, const uint16_t *restrict w, int k,
                     int n, int first, uint16_t bias) {
    const uint8_t *s0 = s, *s1 = s + stride, *s2 = s + 2 * stride, *s3 = s + 3 * stride;
    uint16_t w0 = w[0], w1 = k > 1 ? w[1] : 0, w2 = k > 2 ? w[2] : 0, w3 = k > 3 ? w[3] : 0;
    for (int x = 0; x < n; x++) {
        uint16_t sum = (uint16_t)((first ? bias : to[x]) + high(s0[x] << 8, w0));
        if (k > 1) sum = (uint16_t)(sum + high(s1[x] << 8, w1));
        if (k > 2) sum = (uint16_t)(sum + high(s2[x] << 8, w2));
        if (k > 3) sum = (uint16_t)(sum + high(s3[x] << 8, w3));
        to[x] = sum;
    }
}

/* One output row, at the width of the crop: weighted sum of input rows, in 8.8 fixed point. */
INLINE void vertical(uint16_t *to, const uint8_t *s, ptrdiff_t stride, const uint16_t *w, int count, int n) {
    uint16_t bias = lift(count);
    int first = 1;
    for (int left = count; left > 0; left -= 4, s += 4 * stride, w += 4, first = 0) {
        if (first) {
            switch (left) {
            case 1: add_rows(to, s, stride, w, 1, n, 1, bias); break;
            case 2: add_rows(to, s, stride, w, 2, n, 1, bias); break;
            case 3: add_rows(to, s, stride, w, 3, n, 1, bias); break;
            default: add_rows(to, s, stride, w, 4, n, 1, bias);
            }
        } else {
            switch (left) {
            case 1: add_rows(to, s, stride, w, 1, n, 0, 0); break;
            case 2: add_rows(to, s, stride, w, 2, n, 0, 0); break;
            case 3: add_rows(to, s, stride, w, 3, n, 0, 0); break;
            default: add_rows(to, s, stride, w, 4, n, 0, 0);
            }
        }
    }
}

typedef uint16_t Words __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
#if defined(__clang__)
#define LOW16(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH16(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW8(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH8(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define LOW16(a, b) __builtin_shuffle(a, b, (Words){0, 8, 1, 9, 2, 10, 3, 11})
#define HIGH16(a, b) __builtin_shuffle(a, b, (Words){4, 12, 5, 13, 6, 14, 7, 15})
#define LOW8(a, b) __builtin_shuffle(a, b, (Bytes){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define HIGH8(a, b) __builtin_shuffle(a, b, (Bytes){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#endif

/* 8×8 words turned over: log2(8) rounds of riffling rows i and i + 4. */
INLINE void turn_words(uint16_t *to, ptrdiff_t to_stride, const uint16_t *from, ptrdiff_t from_stride) {
    Words a[8], b[8];
    for (int i = 0; i < 8; i++) memcpy(&a[i], from + i * from_stride, 16);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 4; i++) {
            b[2 * i] = LOW16(a[i], a[i + 4]);
            b[2 * i + 1] = HIGH16(a[i], a[i + 4]);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 8; i++) memcpy(to + i * to_stride, &a[i], 16);
}

/* 16×16 bytes turned over. */
INLINE void turn_bytes(uint8_t *to, ptrdiff_t to_stride, const uint8_t *from, ptrdiff_t from_stride) {
    Bytes a[16], b[16];
    for (int i = 0; i < 16; i++) memcpy(&a[i], from + i * from_stride, 16);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = LOW8(a[i], a[i + 8]);
            b[2 * i + 1] = HIGH8(a[i], a[i + 8]);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 16; i++) memcpy(to + i * to_stride, &a[i], 16);
}

/* The next `k` (a constant) input pixels' share of an output pixel, all BLOCK rows of three channels at once. */
INLINE void add_columns(uint16_t *restrict sum, const uint16_t *restrict s, const uint16_t *restrict w, int k) {
    for (int i = 0; i < 3 * BLOCK; i++) {
        uint16_t all = (uint16_t)(sum[i] + high(s[i], w[0]));
        if (k > 1) all = (uint16_t)(all + high(s[i + 3 * BLOCK], w[1]));
        if (k > 2) all = (uint16_t)(all + high(s[i + 6 * BLOCK], w[2]));
        if (k > 3) all = (uint16_t)(all + high(s[i + 9 * BLOCK], w[3]));
        sum[i] = all;
    }
}

INLINE void put_columns(uint8_t *restrict to, ptrdiff_t stride, const uint16_t *restrict s, const uint16_t *restrict w,
                        int k, uint16_t bias) {
    for (int c = 0; c < 3; c++)
        for (int i = 0; i < BLOCK; i++) {
            const uint16_t *in = s + c * BLOCK + i;
            uint16_t all = (uint16_t)(bias + high(in[0], w[0]));
            if (k > 1) all = (uint16_t)(all + high(in[3 * BLOCK], w[1]));
            if (k > 2) all = (uint16_t)(all + high(in[6 * BLOCK], w[2]));
            if (k > 3) all = (uint16_t)(all + high(in[9 * BLOCK], w[3]));
            if (k > 4) all = (uint16_t)(all + high(in[12 * BLOCK], w[4]));
            to[c * stride + i] = (uint8_t)(all >> 8);
        }
}

/* Output pixels of BLOCK rows from columns of words (pixel, channel, row) to bytes (channel, pixel, row). */
INLINE void horizontal(uint8_t *to, const uint16_t *columns, const Axis *axis, int size, int flip) {
    ptrdiff_t stride = (ptrdiff_t)rounded_up(size) * BLOCK;
    for (int x = 0; x < size; x++) {
        uint16_t sum[3 * BLOCK], bias = (uint16_t)(lift(axis->count[x]) + 128);
        const uint16_t *s = columns + (ptrdiff_t)axis->start[x] * 3 * BLOCK, *w = axis->weight + x * axis->taps;
        uint8_t *place = to + (ptrdiff_t)(flip ? size - 1 - x : x) * BLOCK;
        switch (axis->count[x]) {
        case 1: put_columns(place, stride, s, w, 1, bias); continue;
        case 2: put_columns(place, stride, s, w, 2, bias); continue;
        case 3: put_columns(place, stride, s, w, 3, bias); continue;
        case 4: put_columns(place, stride, s, w, 4, bias); continue;
        case 5: put_columns(place, stride, s, w, 5, bias); continue;
        default: break;
        }
        for (int i = 0; i < 3 * BLOCK; i++) sum[i] = bias;
        int left = axis->count[x];
        for (; left >= 4; left -= 4, s += 12 * BLOCK, w += 4) add_columns(sum, s, w, 4);
        for (; left > 0; left--, s += 3 * BLOCK, w++) add_columns(sum, s, w, 1);
        for (int c = 0; c < 3; c++)
            for (int i = 0; i < BLOCK; i++) place[c * stride + i] = (uint8_t)(sum[c * BLOCK + i] >> 8);
    }
}

/* Crop (height × width RGB pixels) to three planes of size × size, rows padded to a multiple of BLOCK. */
FAST static void resize(uint8_t *planes, const uint8_t *crop, ptrdiff_t stride, int width, int size, int flip,
                        const Axis *down, const Axis *across, uint16_t *rows, uint16_t *columns, uint8_t *turned) {
    int pitch = rounded_up(size), n = 3 * width, room = (n + 7) / 8 * 8;
    memset(turned, 0, 3 * (size_t)pitch * BLOCK);
    for (int y = 0; y < size; y += BLOCK) {
        for (int i = 0; i < BLOCK && y + i < size; i++)
            vertical(rows + (ptrdiff_t)i * room, crop + down->start[y + i] * stride, stride,
                     down->weight + (y + i) * down->taps, down->count[y + i], n);
        for (int x = 0; x < room; x += 8)
            for (int half = 0; half < BLOCK; half += 8)
                turn_words(columns + (ptrdiff_t)x * BLOCK + half, BLOCK, rows + (ptrdiff_t)half * room + x, room);
        horizontal(turned, columns, across, size, flip);
        for (int c = 0; c < 3; c++)
            for (int x = 0; x < pitch; x += BLOCK)
                turn_bytes(planes + ((ptrdiff_t)c * pitch + y) * pitch + x, pitch,
                           turned + ((ptrdiff_t)c * pitch + x) * BLOCK, BLOCK);
    }
}

/* --- colour ------------------------------------------------------------------------------------------------- */

INLINE int luma(int r, int g, int b) { /* ITU-R 601, as Pillow's but for a unit in one pixel of some hundreds */
    return (uint16_t)(high(r << 8, 19595) + high(g << 8, 38470) + high(b << 8, 7471) + 129) >> 8;
}

/* Pillow's blend, clipped, fractions cut off: factor · value + (1 − factor) · from, in 10.6 fixed point. */
typedef struct {
    int beyond;              /* factor > 1: leads away from `from` */
    uint16_t factor, rest;   /* 2.14 fixed point */
} Blend;

static Blend blend_of(double factor) {
    int beyond = factor > 1;
    return (Blend){beyond, (uint16_t)ceil(factor * 16384), (uint16_t)(fabs(1 - factor) * 16384 + 0.5)};
}

INLINE uint8_t blended(uint16_t value, uint16_t other, int beyond) {
    value++; /* makes good for what `high` cut off twice, so that equal values stay what they are */
    uint16_t v = beyond ? (uint16_t)((value > other ? value : other) - other) : (uint16_t)(value + other);
    v = v >> 6;
    return (uint8_t)(v > 255 ? 255 : v);
}

FAST static void blend_constant(uint8_t *plane, int n, int from, Blend blend) {
    uint16_t other = high(from << 8, blend.rest);
    if (from == 0)
        for (int i = 0; i < n; i++) {
            uint16_t v = high(plane[i] << 8, blend.factor) >> 6;
            plane[i] = (uint8_t)(v > 255 ? 255 : v);
        }
    else if (blend.beyond)
        for (int i = 0; i < n; i++) plane[i] = blended(high(plane[i] << 8, blend.factor), other, 1);
    else
        for (int i = 0; i < n; i++) plane[i] = blended(high(plane[i] << 8, blend.factor), other, 0);
}

INLINE void saturate_all(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, int n, Blend blend,
                         int beyond) {
    for (int i = 0; i < n; i++) {
        uint16_t other = high(luma(r[i], g[i], b[i]) << 8, blend.rest);
        r[i] = blended(high(r[i] << 8, blend.factor), other, beyond);
        g[i] = blended(high(g[i] << 8, blend.factor), other, beyond);
        b[i] = blended(high(b[i] << 8, blend.factor), other, beyond);
    }
}

FAST static void saturate(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, int n, Blend blend) {
    if (blend.beyond)
        saturate_all(r, g, b, n, blend, 1);
    else
        saturate_all(r, g, b, n, blend, 0);
}

FAST static int mean_luma(const uint8_t *r, const uint8_t *g, const uint8_t *b, int size, int pitch) {
    uint64_t sum = 0;
    for (int y = 0; y < size; y++) {
        uint32_t line = 0;
        for (int x = y * pitch; x < y * pitch + size; x++) line += (uint32_t)luma(r[x], g[x], b[x]);
        sum += line;
    }
    return (int)((double)sum / ((double)size * size) + 0.5);
}

FAST static void make_gray(uint8_t *restrict r, const uint8_t *restrict g, const uint8_t *restrict b, int n) {
    for (int i = 0; i < n; i++) r[i] = (uint8_t)luma(r[i], g[i], b[i]);
}

INLINE float within(float v, float low, float top) {
    v = v < low ? low : v;
    return v > top ? top : v;
}

/* RGB → Pillow's 8-bit HSV, hue + shift (mod 256), → RGB. */
FAST static void turn_hue(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, int n, int shift) {
    for (int i = 0; i < n; i++) {
        float ri = r[i], gi = g[i], bi = b[i];
        float most = ri > gi ? ri : gi, least = ri < gi ? ri : gi;
        most = most > bi ? most : bi;
        least = least < bi ? least : bi;
        float chroma = most - least;
        float difference = most == gi ? bi - ri : ri - gi, sector = most == gi ? 85.0f : 170.0f;
        difference = most == ri ? gi - bi : difference;
        sector = most == ri ? 0.0f : sector;
        /* the small number stands for what Pillow's double arithmetic loses just below whole numbers */
        float hue = sector + 42.5f * difference / (chroma > 1 ? chroma : 1.0f) - 1e-4f;
        hue += hue < -2e-4f ? 255.0f : 0.0f;
        hue = hue < 0 ? 0 : hue;
        int turned = ((int)hue + shift) & 255;
        int saturation = (int)(chroma * 255.0f / (most > 1 ? most : 1.0f));
        float six = (float)turned * (6.0f / 255.0f), loss = most * ((float)saturation * (1.0f / 255.0f));
        /* the share of the loss that each channel bears goes up and down a ramp along the hue */
        r[i] = (uint8_t)(int)(most - loss * within(2 - fabsf(six - 3), 0, 1) + 0.5f);
        g[i] = (uint8_t)(int)(most - loss * within(fabsf(six - 2) - 1, 0, 1) + 0.5f);
        b[i] = (uint8_t)(int)(most - loss * within(fabsf(six - 4) - 1, 0, 1) + 0.5f);
    }
}

/* --- blur --------------------------------------------------------------------------------------------------- */

static double box_radius(double sigma) { /* extended box whose third convolution has this variance */
    double s = sigma * sigma / 3, l = floor((sqrt(12 * s + 1) - 1) / 2);
    return l + (2 * l + 1) * (l * (l + 1) - 3 * s) / (6 * (s - (l + 1) * (l + 1)));
}

/* Half of the kernel of three box blurs, middle first, in 0.16 fixed point; returns its radius. */
static int fill_blur(uint16_t *half, double sigma, double *work) {
    double radius = box_radius(sigma);
    int l = (int)radius, reach = 3 * (l + 1), width = 2 * reach + 1, sum = 0;
    if (!(reach < REACH)) return -1;
    double inner = 1 / (2 * radius + 1), outer = (1 - (2 * l + 1) * inner) / 2;
    double *a = work, *b = work + width;
    memset(work, 0, 2 * (size_t)width * sizeof *work);
    a[reach] = 1;
    for (int pass = 0; pass < 3; pass++) {
        for (int i = 0; i < width; i++) {
            b[i] = 0;
            for (int j = -l - 1; j <= l + 1; j++)
                if (i + j >= 0 && i + j < width) b[i] += a[i + j] * (j == -l - 1 || j == l + 1 ? outer : inner);
        }
        double *swap = a;
        a = b;
        b = swap;
    }
    for (int i = reach; i > 0; i--) sum += 2 * (half[i] = (uint16_t)(65535 * a[reach + i] + 0.5));
    half[0] = (uint16_t)(65535 - sum);
    return reach;
}

/* Three neighbours on both sides, weighted: reaches from 1 to 3 and from 4 to 6 are one and two calls. */
#define SIDES(start, at) plus(plus(plus(start, high(at(1), h1)), high(at(2), h2)), high(at(3), h3))
#define MORE_SIDES(start, at) plus(plus(plus(start, high(at(4), h4)), high(at(5), h5)), high(at(6), h6))

/* One row of the vertical pass, in 9.7 fixed point. */
INLINE void blur_down(uint16_t *restrict to, const uint8_t *restrict from, int y, int size, int pitch,
                      const uint16_t *restrict half, int reach, uint16_t bias) {
    const uint16_t h0 = half[0], h1 = half[1], h2 = half[2], h3 = half[3];
#define ROW(t) (from + (ptrdiff_t)((t) < 0 ? 0 : (t) >= size ? size - 1 : (t)) * pitch)
#define ABOVE_BELOW(t) ((a##t[x] + b##t[x]) << 7)
    const uint8_t *restrict s = ROW(y), *restrict a1 = ROW(y - 1), *restrict b1 = ROW(y + 1), *restrict a2 = ROW(y - 2),
                  *restrict b2 = ROW(y + 2), *restrict a3 = ROW(y - 3), *restrict b3 = ROW(y + 3);
    for (int x = 0; x < pitch; x++) to[x] = SIDES(plus(bias, high(s[x] << 7, h0)), ABOVE_BELOW);
    if (reach == 3) return;
    const uint16_t h4 = half[4], h5 = half[5], h6 = half[6];
    const uint8_t *restrict a4 = ROW(y - 4), *restrict b4 = ROW(y + 4), *restrict a5 = ROW(y - 5),
                  *restrict b5 = ROW(y + 5), *restrict a6 = ROW(y - 6), *restrict b6 = ROW(y + 6);
    for (int x = 0; x < pitch; x++) to[x] = MORE_SIDES(to[x], ABOVE_BELOW);
    for (int t = 7; t <= reach; t++) {
        const uint8_t *restrict above = ROW(y - t), *restrict below = ROW(y + t);
        for (int x = 0; x < pitch; x++) to[x] = (uint16_t)(to[x] + high((above[x] + below[x]) << 7, half[t]));
    }
}

INLINE void blur_across(uint8_t *restrict to, uint16_t *restrict sum, const uint16_t *restrict mid, int pitch,
                        const uint16_t *restrict half, int reach, uint16_t bias) {
    const uint16_t h0 = half[0];
    for (int x = 0; x < pitch; x++) sum[x] = plus(bias, high(mid[x], h0));
    for (int t = 1; t <= reach; t++) { /* one pair a loop: GCC makes vectors of no more at once */
        const uint16_t *restrict a = mid - t, *restrict b = mid + t;
        const uint16_t h = half[t];
        for (int x = 0; x < pitch; x++) sum[x] = plus(sum[x], high((uint16_t)(a[x] + b[x]), h));
    }
    for (int x = 0; x < pitch; x++) to[x] = (uint8_t)(sum[x] >> 7);
}

INLINE void blur_rows(uint8_t *to, const uint8_t *from, int size, int pitch, const uint16_t *half, int reach,
                      uint16_t *row) {
    uint16_t bias = (uint16_t)smaller((reach + 1) / 2, 31); /* bounded, so that white cannot overflow */
    uint16_t *mid = row + reach, *sum = row + 2 * reach + pitch;
    for (int y = 0; y < size; y++) {
        blur_down(mid, from, y, size, pitch, half, reach, bias);
        for (int t = 1; t <= reach; t++) mid[-t] = mid[0], mid[size - 1 + t] = mid[size - 1];
        blur_across(to + (ptrdiff_t)y * pitch, sum, mid, pitch, half, reach, (uint16_t)(bias + 64));
    }
}

/* One plane, edges repeated. `row` has room for the padded row and a sum. A reach is a multiple of three. */
FAST static void blur(uint8_t *to, const uint8_t *from, int size, int pitch, const uint16_t *half, int reach,
                      uint16_t *row) {
    if (reach == 3)
        blur_rows(to, from, size, pitch, half, 3, row);
    else
        blur_rows(to, from, size, pitch, half, reach, row);
}

/* --- the view ----------------------------------------------------------------------------------------------- */

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Bytes){__VA_ARGS__})
#endif

INLINE uint8_t solarized(uint8_t v) { return v < 128 ? v : (uint8_t)(255 - v); }

/* Planes to interleaved pixels; the vectors are first those of two channels, then the third put in. */
FAST static void interleave(uint8_t *to, const uint8_t *r, const uint8_t *g, const uint8_t *b, int size, int pitch,
                            int solarize) {
    const Bytes half = {128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128};
    for (int y = 0; y < size; y++, to += 3 * (ptrdiff_t)size, r += pitch, g += pitch, b += pitch) {
        int x = 0;
        for (; x + 16 <= size; x += 16) {
            Bytes v[3], w[3];
            memcpy(&v[0], r + x, 16), memcpy(&v[1], g + x, 16), memcpy(&v[2], b + x, 16);
            if (solarize) /* the smaller of v and 255 − v, which is its complement */
                for (int c = 0; c < 3; c++) v[c] = (v[c] & (Bytes)(v[c] < half)) | (~v[c] & (Bytes)(v[c] >= half));
            w[0] = PICK(v[0], v[1], 0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5);
            w[1] = PICK(v[0], v[1], 21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26);
            w[2] = PICK(v[0], v[1], 0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0);
            w[0] = PICK(w[0], v[2], 0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15);
            w[1] = PICK(w[1], v[2], 0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15);
            w[2] = PICK(w[2], v[2], 26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31);
            memcpy(to + 3 * x, w, 48);
        }
        for (; x < size; x++) {
            to[3 * x] = solarize ? solarized(r[x]) : r[x];
            to[3 * x + 1] = solarize ? solarized(g[x]) : g[x];
            to[3 * x + 2] = solarize ? solarized(b[x]) : b[x];
        }
    }
}

static void jitter(uint8_t *planes, int size, int pitch, const int *order, const double *factors) {
    int n = size * pitch;
    uint8_t *r = planes, *g = r + (ptrdiff_t)pitch * pitch, *b = g + (ptrdiff_t)pitch * pitch;
    for (int i = 0; i < 4; i++) {
        double factor = factors[order[i]];
        if (order[i] == 3) {
            turn_hue(r, g, b, n, (int)(factor * 255) & 255); /* rounds hues to 8 bits, at no shift too */
        } else if (order[i] == 2) {
            saturate(r, g, b, n, blend_of(factor));
        } else {
            int from = order[i] == 1 ? mean_luma(r, g, b, size, pitch) : 0;
            for (int c = 0; c < 3; c++) blend_constant(planes + (ptrdiff_t)c * pitch * pitch, n, from, blend_of(factor));
        }
    }
}

/* Write the view of a crop to `out`, (size, size, 3) bytes.

   crop: RGB pixels, height rows of width, `stride` bytes apart.
   box: top, left, height, width of what is seen, in pixels of the crop; fractions where an image was decoded smaller.
   what: flip, jitter, grey, solarise (0 or 1), then the order of the four jitter operations.
   how: the four jitter factors (of brightness, contrast, saturation: 0 ≤ factor < 4), then the blur's standard
   deviation in pixels (0: none).
   Returns 0, or 1 where memory is short or the blur too wide. */
static int view_of(const uint8_t *crop, ptrdiff_t stride, int height, int width, const double *box, uint8_t *out, int size,
                   const int *what, const double *how) {
    int pitch = rounded_up(size), room = (3 * width + 7) / 8 * 8, failed = 1;
    size_t plane = (size_t)pitch * pitch;
    Axis down = {.taps = taps_of(box[2], size)}, across = {.taps = taps_of(box[3], size)};
    size_t sizes[] = {3 * plane, 3 * plane, 3 * (size_t)pitch * BLOCK, 4 * (size_t)size * sizeof(int),
                      (size_t)size * (size_t)(down.taps + across.taps) * 2, 2 * (size_t)room * BLOCK,
                      2 * (size_t)room * BLOCK, 4 * (size_t)pitch + 1024, 8192};
    enum { PARTS = sizeof sizes / sizeof *sizes };
    uint8_t *part[PARTS];
    size_t total = 64;
    for (int i = 0; i < PARTS; i++) total += sizes[i] = (sizes[i] + 63) / 64 * 64;
    uint8_t *memory = malloc(total);
    if (!memory) return 1;
    part[0] = memory + (64 - (uintptr_t)memory % 64);
    for (int i = 1; i < PARTS; i++) part[i] = part[i - 1] + sizes[i - 1];
    down.start = (int *)part[3], down.count = down.start + size;
    across.start = down.count + size, across.count = across.start + size;
    down.weight = (uint16_t *)part[4], across.weight = down.weight + (ptrdiff_t)size * down.taps;
    fill_axis(&down, height, box[0], box[2], size);
    fill_axis(&across, width, box[1], box[3], size);
    resize(part[0], crop, stride, width, size, what[0], &down, &across, (uint16_t *)part[5], (uint16_t *)part[6],
           part[2]);
    if (what[1]) jitter(part[0], size, pitch, what + 4, how);
    uint8_t *planes[3] = {part[0], part[0] + plane, part[0] + 2 * plane};
    if (what[2]) {
        make_gray(planes[0], planes[1], planes[2], size * pitch);
        planes[1] = planes[2] = planes[0];
    }
    if (how[4] > 0) {
        uint16_t half[REACH];
        int reach = fill_blur(half, how[4], (double *)part[8]);
        if (reach < 0) goto end;
        for (int c = 0; c < (what[2] ? 1 : 3); c++)
            blur(part[1] + c * plane, planes[c], size, pitch, half, reach, (uint16_t *)part[7]);
        for (int c = 0; c < 3; c++) planes[c] = part[1] + (what[2] ? 0 : c * plane);
    }
    interleave(out, planes[0], planes[1], planes[2], size, pitch, what[3]);
    failed = 0;
end:
    free(memory);
    return failed;
}

/* Write the views of an image, (size, size, 3) bytes each.

   pixels: RGB, height rows of width, `stride` bytes apart.
   numbers: of each view its size, box (top, left, height, width, in pixels of the image), what and how, as above.
   out: where each view goes.
   Returns 0; 1 where memory is short or a blur too wide; 2 where a box lies outside. */
EXPORTED int mocov3_views(const uint8_t *pixels, ptrdiff_t stride, int height, int width, int views,
                          const double *numbers, uint8_t *const *out) {
    enum { WHAT = 8, HOW = 5, NUMBERS = 1 + 4 + WHAT + HOW };
    for (int i = 0; i < views; i++, numbers += NUMBERS) {
        const double *seen = numbers + 1;
        double top = floor(seen[0]), left = floor(seen[1]), bottom = ceil(seen[0] + seen[2]), right = ceil(seen[1] + seen[3]);
        if (!(0 <= top && top < bottom && bottom <= height && 0 <= left && left < right && right <= width)) return 2;
        double box[4] = {seen[0] - top, seen[1] - left, seen[2], seen[3]};
        int what[WHAT];
        for (int j = 0; j < WHAT; j++) what[j] = (int)numbers[5 + j];
        if (view_of(pixels + (ptrdiff_t)top * stride + 3 * (ptrdiff_t)left, stride, (int)(bottom - top), (int)(right - left),
                    box, out[i], (int)numbers[0], what, numbers + 5 + WHAT))
            return 1;
    }
    return 0;
}

/* --- draws: mocov3/data/views/draws.py, to the last bit ----------------------------------------------------------- */

enum { TRIES = 10, UNIFORM = 2 * TRIES + 18 };

INLINE uint64_t product(uint64_t a, uint64_t b, uint64_t *upper) { /* of 64 bits each */
    uint64_t low = (uint32_t)a * (uint64_t)(uint32_t)b, one = (a >> 32) * (uint32_t)b + (low >> 32);
    uint64_t two = (uint32_t)a * (b >> 32) + (uint32_t)one;
    *upper = (a >> 32) * (b >> 32) + (one >> 32) + (two >> 32);
    return a * b;
}

/* Uniform numbers of numpy's Philox(key=[seed, stream], counter=[0, 0, index, epoch]): Philox 4×64 of ten rounds
   (Salmon et al. 2011), 53 bits each. */
static void fill_uniform(double *u, uint64_t seed, uint64_t stream, uint64_t index, uint64_t epoch) {
    for (int block = 0; 4 * block < UNIFORM; block++) {
        uint64_t c[4] = {(uint64_t)block + 1, 0, index, epoch}, key[2] = {seed, stream};
        for (int round = 0; round < 10; round++) {
            uint64_t above, over, first = product(0xD2E7470EE14C6C93u, c[0], &above);
            uint64_t second = product(0xCA5A826395121157u, c[2], &over);
            c[0] = over ^ c[1] ^ key[0], c[1] = second, c[2] = above ^ c[3] ^ key[1], c[3] = first;
            key[0] += 0x9E3779B97F4A7C15u, key[1] += 0xBB67AE8584CAA73Bu;
        }
        for (int i = 0; i < 4 && 4 * block + i < UNIFORM; i++) u[4 * block + i] = (double)(c[i] >> 11) * 0x1p-53;
    }
}

INLINE double between(double u, const double *pair) { return pair[0] + (pair[1] - pair[0]) * u; }

/* The crop: as `_crop` of draws.py. shares: smallest, largest; ratio: smallest, largest, and their logarithms. */
static void draw_crop(double *crop, const double *u, int width, int height, const double *shares, const double *ratio) {
    double w = width, h = height, shape = (double)width / height;
    for (int i = 0; i < TRIES; i++) {
        double area = (double)width * height * between(u[2 * i], shares), r = exp(between(u[2 * i + 1], ratio + 2));
        double across = rint(sqrt(area * r)), down = rint(sqrt(area / r));
        if (0 < across && across <= width && 0 < down && down <= height) {
            crop[0] = floor(u[2 * TRIES] * (height - down + 1)), crop[1] = floor(u[2 * TRIES + 1] * (width - across + 1));
            crop[2] = down, crop[3] = across;
            return;
        }
    }
    if (shape < ratio[0])
        h = fmin(rint(width / ratio[0]), height);
    else if (shape > ratio[1])
        w = fmin(rint(height * ratio[1]), width);
    h = fmax(h, 1), w = fmax(w, 1);
    crop[0] = floor((height - h) / 2), crop[1] = floor((width - w) / 2), crop[2] = h, crop[3] = w;
}

/* The draws of views of one image of width × height pixels, as `draw` of draws.py.

   settings: of each view its stream, the shares and ratio of the crop as above, the chance of jitter and the lowest and
   highest of its four factors, the chances of grey, blur, solarisation, both flips and turns, the blur's range.
   out: of each view top, left, height, width; jitter, its order, its factors; grey, blur (−1: none), solarise, both
   flips, quarter turns. */
EXPORTED void mocov3_draws(uint64_t seed, uint64_t index, uint64_t epoch, int width, int height, int views,
                           const double *settings, double *out) {
    enum { SETTINGS = 24, NUMBERS = 19 };
    for (int i = 0; i < views; i++, settings += SETTINGS, out += NUMBERS) {
        double u[UNIFORM], *c = u + 2 * TRIES + 2;
        const double *factors = settings + 8, *chances = settings + 16;
        fill_uniform(u, seed, (uint64_t)settings[0], index, epoch);
        draw_crop(out, u, width, height, settings + 1, settings + 3);
        out[4] = c[0] < settings[7];
        for (int j = 0; j < 4; j++) {
            int before = 0; /* how many of the four come first */
            for (int k = 0; k < 4; k++) before += c[1 + k] < c[1 + j] || (c[1 + k] == c[1 + j] && k < j);
            out[5 + before] = j;
            out[9 + j] = between(c[5 + j], factors + 2 * j);
        }
        out[13] = c[9] < chances[0];
        out[14] = c[10] < chances[1] ? between(c[11], settings + 22) : -1;
        out[15] = c[12] < chances[2];
        out[16] = c[13] < chances[3];
        out[17] = c[14] < chances[4];
        out[18] = c[15] < chances[5] ? 1 + floor(3 * c[15] / chances[5]) : 0;
    }
}

/* --- the centre of a resized image, to Pillow's last bit ------------------------------------------------------- */

/* Pillow's own arithmetic: weights of 22 bits, 8 bits between the passes, rows before columns. */
enum { BITS = 22 };
typedef int32_t Four __attribute__((vector_size(16)));
typedef uint8_t FourBytes __attribute__((vector_size(4)));

typedef struct {
    int taps; /* room for this many weights an output pixel */
    int *start, *count;
    int32_t *weight;
} Exact;

INLINE double filtered(double x, int cubic) { /* a triangle, or Keys' cubic with a = −1/2 */
    x = fabs(x);
    if (!cubic) return x < 1 ? 1 - x : 0;
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

static int exact_taps(int in, int out, int cubic) {
    double scale = (double)in / out;
    return 2 * (int)ceil((cubic ? 2 : 1) * (scale > 1 ? scale : 1)) + 1;
}

/* Weights of the output pixels begin … begin + n − 1 of `out`. */
static void fill_exact(Exact *axis, int in, int out, int begin, int n, int cubic, double *work) {
    double scale = (double)in / out, wide = scale > 1 ? scale : 1, support = (cubic ? 2 : 1) * wide, slope = 1 / wide;
    for (int i = 0; i < n; i++) {
        double centre = (begin + i + 0.5) * scale, sum = 0;
        int low = (int)(centre - support + 0.5), end = (int)(centre + support + 0.5);
        if (low < 0) low = 0;
        if (end > in) end = in;
        for (int j = 0; j < end - low; j++) sum += work[j] = filtered((j + low - centre + 0.5) * slope, cubic);
        for (int j = 0; j < end - low; j++) {
            double w = (sum != 0 ? work[j] / sum : work[j]) * (1 << BITS);
            axis->weight[(size_t)i * axis->taps + j] = (int32_t)(w < 0 ? w - 0.5 : w + 0.5);
        }
        for (int j = end - low; j < axis->taps; j++) axis->weight[(size_t)i * axis->taps + j] = 0;
        axis->start[i] = low, axis->count[i] = end - low;
    }
}

INLINE uint8_t clipped(int32_t sum) {
    int32_t v = sum >> BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

FAST static void exact_row(uint8_t *restrict to, const uint8_t *restrict row, int n, const Exact *axis, int taps) {
    for (int i = 0; i < n; i++) {
        const int32_t *weight = axis->weight + (size_t)i * axis->taps;
        const uint8_t *from = row + 3 * (size_t)axis->start[i];
        Four sum = {1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1), 0};
        for (int j = 0; j < taps; j++) { /* as many for every pixel, some of weight 0: no branch to guess */
            FourBytes pixel;
            memcpy(&pixel, from + 3 * j, 4);
            sum += __builtin_convertvector(pixel, Four) * weight[j];
        }
        sum >>= BITS;
        sum &= ~(sum >> 31);
        Four over = sum > 255;
        FourBytes whole = __builtin_convertvector((over & 255) | (~over & sum), FourBytes);
        memcpy(to + 3 * i, &whole, 4); /* the fourth byte is the next pixel's */
    }
}

FAST static void exact_column(uint8_t *restrict to, const uint8_t *restrict rows, int n, int count,
                              const int32_t *restrict weight, int32_t *restrict sum) {
    for (int i = 0; i < n; i++) sum[i] = 1 << (BITS - 1);
    for (int j = 0; j < count; j++) {
        const uint8_t *row = rows + (size_t)j * n;
        int32_t w = weight[j];
        for (int i = 0; i < n; i++) sum[i] += row[i] * w;
    }
    for (int i = 0; i < n; i++) to[i] = clipped(sum[i]);
}

/* Write to `out`, (size, size, 3) bytes, the square at (top, left) of RGB pixels (height rows of width, `stride` bytes
   apart) resized to (tall, wide). Returns 0, or 1 where memory is short. */
EXPORTED int mocov3_centre(const uint8_t *pixels, ptrdiff_t stride, int height, int width, int tall, int wide, int top, int left,
                  uint8_t *out, int size, int cubic) {
    Exact down = {.taps = exact_taps(height, tall, cubic)}, across = {.taps = exact_taps(width, wide, cubic)};
    int most = down.taps > across.taps ? down.taps : across.taps;
    size_t line = 3 * (size_t)size, row = 3 * (size_t)width, beyond = 3 * (size_t)across.taps + 1;
    size_t sizes[] = {most * sizeof(double), 4 * (size_t)size * sizeof(int),
                      (size_t)size * (size_t)(down.taps + across.taps) * 4, line * 4, row + beyond, line * (size_t)height + 1};
    enum { PARTS = sizeof sizes / sizeof *sizes };
    uint8_t *part[PARTS];
    size_t total = 0;
    for (int i = 0; i < PARTS; i++) total += sizes[i] = (sizes[i] + 63) / 64 * 64;
    uint8_t *memory = malloc(total);
    if (!memory) return 1;
    part[0] = memory;
    for (int i = 1; i < PARTS; i++) part[i] = part[i - 1] + sizes[i - 1];
    down.start = (int *)part[1], down.count = down.start + size;
    across.start = down.count + size, across.count = across.start + size;
    down.weight = (int32_t *)part[2], across.weight = down.weight + (size_t)size * down.taps;
    fill_exact(&down, height, tall, top, size, cubic, (double *)part[0]);
    fill_exact(&across, width, wide, left, size, cubic, (double *)part[0]);
    int first = down.start[0], end = down.start[size - 1] + down.count[size - 1];
    int taps = 0;
    for (int i = 0; i < size; i++) taps = across.count[i] > taps ? across.count[i] : taps;
    memset(part[4] + row, 0, beyond); /* read with the last pixels, and not used */
    for (int y = first; y < end; y++) {
        memcpy(part[4], pixels + y * stride, row);
        exact_row(part[5] + (size_t)(y - first) * line, part[4], size, &across, taps);
    }
    for (int i = 0; i < size; i++)
        exact_column(out + i * line, part[5] + (size_t)(down.start[i] - first) * line, (int)line, down.count[i],
                     down.weight + (size_t)i * down.taps, (int32_t *)part[3]);
    free(memory);
    return 0;
}
