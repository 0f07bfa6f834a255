/* A library of cuBLAS's name, for a backend that needs one. */
int cublasCreate_v2(void) { return 1; }
