//! Fixtures for the tests that need a kernel.
