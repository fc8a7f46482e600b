// `product_norm.cu` on the emulated machine, and its places, for Python.
#define MACHINE "emulated_hopper.h"
#include "product_norm.cu"

extern "C" {
struct Arguments {
    TensorMap x, weight, residual;
    const float *bias, *norm_weight, *norm_bias;
    unsigned short *out;
    const long long *control;
    int rows_per_pair, num_in;
    float epsilon;
};
// Writes the first fault into `fault`, of 200 bytes.
void run_product_norm(unsigned grid, unsigned num_bytes, unsigned seed, const Arguments *given,
                      char *fault) {
    const std::string found = run_grid(grid, num_bytes, seed, [given] {
        const Arguments &a = *given;
        product_norm(a.x, 0, 0, 0, 0, a.weight, 0, 0, 0, 0, a.residual, 0, 0, 0, 0, a.bias,
                     a.norm_weight, a.norm_bias, a.out, a.control, a.rows_per_pair, a.num_in,
                     a.epsilon);
    });
    std::strncpy(fault, found.c_str(), 199);
}
int shared_bytes() { return SHARED_BYTES; }
int place_of_sum_row(int thread, int sum) { return sum_row(thread, sum); }
int place_of_sum_column(int thread, int sum) { return sum_column(thread, sum); }
unsigned place_of_sum(int thread, int row, int sum) { return sum_place(thread, row, sum); }
unsigned place_of_element(int row, int column) { return swizzled(row, column, BOX_BYTES); }
unsigned long long descriptor_of(unsigned address) { return descriptor(address); }
}
