//! How a Service spreads its connections: what fills the range of slots, and how the kernel picks from it. A new
//! algorithm is a new type with this trait.

use proxy_common::service::Pick;

/// A way to spread connections.
pub trait Algorithm {
    /// What the range holds for these endpoints, which come in order and without repetition.
    fn fill<T: Clone>(&self, targets: &[T]) -> Vec<T>;

    /// How the kernel makes an index into the range.
    fn pick(&self) -> Pick;
}

/// Every endpoint is as likely as any other, for each connection anew.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Algorithm for Random {
    fn fill<T: Clone>(&self, targets: &[T]) -> Vec<T> {
        targets.to_vec()
    }

    fn pick(&self) -> Pick {
        Pick::Random
    }
}
