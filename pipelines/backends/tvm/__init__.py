"""UNets compiled with Apache TVM. Only this package imports tvm; `packing` and `artifacts` go without."""
