"""The C++ operators, called with what nobody thought of, under the sanitizers: ``make fuzz``."""
