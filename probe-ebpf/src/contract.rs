//! What tests and programs have to agree on.

/// Words of a key and of a value of IPv4.
pub const V4: (usize, usize) = (2, 6);
/// Words of a key and of a value of IPv6.
pub const V6: (usize, usize) = (5, 11);

/// Keys that are stirred, in four buckets: three times as many as there are entries.
pub const KEYS: u64 = 48;
/// The first of them are connections, which nobody takes out.
pub const CONNECTIONS: u64 = 3;
/// The mask of the buckets that are stirred.
pub const STIRRED: u32 = 3;

/// What is counted while the table is stirred: index of `COUNTS`.
pub mod count {
    /// Runs.
    pub const ACTS: u32 = 0;
    /// Values that were found under a key and are not its own.
    pub const TORN: u32 = 1;
    /// Connections that were not found.
    pub const LOST: u32 = 2;
    /// Packets and bytes noted that are not the flow's own.
    pub const WRONG: u32 = 3;
    /// Look-ups that found their entry being written each time.
    pub const BUSY: u32 = 4;
    /// Values found.
    pub const FOUND: u32 = 5;
    /// Keys entered in a free entry or that of another.
    pub const ENTERED: u32 = 6;
    /// Keys that others were entering.
    pub const LOCKED: u32 = 7;
    /// Connections displaced by a flow that is not.
    pub const DISPLACED: u32 = 8;
    /// Values written anew.
    pub const REWRITTEN: u32 = 9;
    /// Values found that the other CPU has written.
    pub const FOREIGN: u32 = 10;
    /// How many there are.
    pub const ALL: usize = 11;
}

/// A key that is stirred. Its halves are those of others, too.
#[inline(always)]
#[must_use]
pub const fn key(number: u64) -> [u64; V4.0] {
    [number >> 3, number & 7]
}

/// A version of its value: every word of it tells the key, the version, and which word it is.
#[inline(always)]
#[must_use]
pub const fn value(number: u64, version: u64) -> [u64; V4.1] {
    let base = number << 48 | version << 8;
    [base, base | 1, base | 2, base | 3, base | 4, base | 5]
}
