//! The words by which the set-associative flow table is kept: what a bucket says of each of its entries, and where a key may
//! stand. Both are plain numbers; who changes them, and in which order, is the library's.

use proxy_common::{addr::Protocol, lifetime};

/// Entries in a bucket.
pub const WAYS: usize = 4;

/// What is known of an entry without looking at it: one word, so that it changes in one step.
///
/// ```text
///  0..32  last seen, jiffies        50  kept: outlives a flood of first packets
/// 32..40  bits of `flow::state`     51  its value is being written
/// 40..48  tag of its key; 0: none   52..64  turn: another number each time key or value change
/// 48..50  protocol
/// ```
///
/// An entry without a tag is free, or, while its value is being written, on its way to a new owner.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head(pub u64);

impl Head {
    /// The flow outlives a flood of first packets.
    pub const KEPT: u64 = 1 << 50;
    const BUSY: u64 = 1 << 51;
    const STATE: u32 = 32;
    const TAG: u32 = 40;
    const TAGS: u64 = 0xff << Self::TAG;
    const PROTOCOL: u32 = 48;
    const TURN: u64 = 1 << 52;
    const TURNS: u64 = !(Self::TURN - 1);
    /// What stays as long as the entry is the same flow's and its value is not written.
    const TENURE: u64 = Self::TAGS | Self::BUSY | Self::TURNS;

    /// What is said of a flow; tag and turn are added when it gets an entry.
    #[inline(always)]
    #[must_use]
    pub const fn new(protocol: Protocol, state: u8, last_seen: u32) -> Self {
        let protocol = match protocol {
            Protocol::Udp => 1,
            Protocol::Sctp => 2,
            _ => 0,
        };
        Self(last_seen as u64 | (state as u64) << Self::STATE | protocol << Self::PROTOCOL)
    }

    /// The same of a flow that outlives a flood of first packets.
    #[inline(always)]
    #[must_use]
    pub const fn kept(self) -> Self {
        Self(self.0 | Self::KEPT)
    }

    /// Bits of [`flow::state`](proxy_common::flow::state) where they stand in the word.
    #[inline(always)]
    pub const fn bits(state: u8) -> u64 {
        (state as u64) << Self::STATE
    }

    /// Jiffies, the low half.
    #[inline(always)]
    pub const fn last_seen(self) -> u32 {
        self.0 as u32
    }

    /// Bits of [`flow::state`](proxy_common::flow::state).
    #[inline(always)]
    pub const fn state(self) -> u8 {
        (self.0 >> Self::STATE) as u8
    }

    /// Changes with each owner and each value.
    #[inline(always)]
    pub const fn turn(self) -> u64 {
        self.0 >> 52
    }

    /// 0, or that of the key.
    #[inline(always)]
    pub const fn tag(self) -> u64 {
        (self.0 & Self::TAGS) >> Self::TAG
    }

    /// Whether its value is being written.
    #[inline(always)]
    pub const fn is_busy(self) -> bool {
        self.0 & Self::BUSY != 0
    }

    /// Whether a flow has it, or had it until it was needed for another.
    #[inline(always)]
    pub const fn is_taken(self) -> bool {
        self.0 & (Self::TAGS | Self::BUSY) != 0
    }

    /// Whether key and value are what they were when it said `other`.
    #[inline(always)]
    pub const fn is_same_tenure(self, other: Self) -> bool {
        (self.0 ^ other.0) & Self::TENURE == 0
    }

    /// While its value is written.
    #[inline(always)]
    #[must_use]
    pub const fn busy(self) -> Self {
        Self(self.0 | Self::BUSY)
    }

    /// While it gets a new owner, whom nobody is to find yet.
    #[inline(always)]
    #[must_use]
    pub const fn reserved(self) -> Self {
        Self(self.0 & Self::TURNS | Self::BUSY)
    }

    /// When it has no owner any more.
    #[inline(always)]
    #[must_use]
    pub const fn freed(self) -> Self {
        Self((self.0 & Self::TURNS).wrapping_add(Self::TURN))
    }

    /// When what was written is there to be read, by `flow` under a key with this tag.
    #[inline(always)]
    #[must_use]
    pub const fn published(self, flow: Self, tag: u64) -> Self {
        let about = flow.0 & !(Self::TENURE);
        Self((self.0 & Self::TURNS).wrapping_add(Self::TURN) | about | tag << Self::TAG)
    }

    /// With bits more, and seen at another time.
    #[inline(always)]
    #[must_use]
    pub const fn amended(self, bits: u64, last_seen: u32) -> Self {
        Self(self.0 & !0xffff_ffff | bits | last_seen as u64)
    }

    /// Seconds of silence after which nobody misses the flow.
    #[inline(always)]
    pub const fn seconds_to_be_over(self) -> u32 {
        let protocol = match self.0 >> Self::PROTOCOL & 3 {
            0 => Protocol::Tcp,
            1 => Protocol::Udp,
            _ => Protocol::Sctp,
        };
        lifetime::seconds_to_be_over(protocol, self.state())
    }

    /// Whether it may be displaced by whatever comes: the flow has shown nothing but a first packet.
    #[inline(always)]
    pub const fn is_embryo(self) -> bool {
        self.0 & Self::KEPT == 0
    }
}

/// How many packets an entry has noted, and of how many bytes: 0..32 bytes, 32..48 packets, 52..64 the turn they were noted in.
///
/// It is written without asking who owns the entry by then: what was noted in another turn is nobody's.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Noted(pub u64);

impl Noted {
    /// Nothing.
    #[inline(always)]
    #[must_use]
    pub const fn none(owner: Head) -> Self {
        Self(owner.0 & Head::TURNS)
    }

    /// What of it is the owner's.
    #[inline(always)]
    #[must_use]
    pub const fn of(self, owner: Head) -> Self {
        if (self.0 ^ owner.0) & Head::TURNS == 0 { self } else { Self::none(owner) }
    }

    /// With a packet more.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, bytes: u32) -> Self {
        let packets = (self.0 >> 32).wrapping_add(1) & 0xffff;
        let bytes = (self.0 as u32).wrapping_add(bytes);
        Self(self.0 & Head::TURNS | packets << 32 | bytes as u64)
    }

    /// Packets.
    #[inline(always)]
    pub const fn packets(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// Bytes of them.
    #[inline(always)]
    pub const fn bytes(self) -> u32 {
        self.0 as u32
    }
}

/// The seed of the table's hash: random numbers, drawn when the table is made and kept as long as it is.
///
/// The hash is pair-multiply-shift (Thorup, *High Speed Hashing for Integers and Strings*, 2015, §3.4): a sum of
/// `(a + x) * (b + y)` over pairs of 32-bit words, modulo 2^64. For random `a` and `b` any two keys meet with a probability of at most
/// 2^-32, whatever they are: who does not know the seed cannot choose keys that meet. The sum alone would do for any two keys, but not
/// for rows of them: those of one client's ports are evenly spaced, and at some distances they fall on a few buckets only (one
/// table in five was half full when the first flow found no room). So its bits are mixed as `MurmurHash3` mixes them, which keeps
/// apart what was apart. It takes a multiplication for each word of 64 bits, and two.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub [u64; SEEDS]);

/// Two for each word of the longest key, and one to begin with.
pub const SEEDS: usize = 11;

impl Seed {
    /// Stretches one random number, by splitmix64.
    #[must_use]
    pub const fn from_random(random: u64) -> Self {
        let mut seed = [0; SEEDS];
        let mut from = random;
        let mut rest: &mut [u64] = &mut seed;
        while let [place, others @ ..] = rest {
            from = from.wrapping_add(0x9e37_79b9_7f4a_7c15);
            *place = split(from);
            rest = others;
        }
        Self(seed)
    }

    /// Where a key may stand in a table of `mask + 1` buckets: a power of two, no less than two and no more than 2^24.
    #[inline(always)]
    #[must_use]
    pub fn places<const K: usize>(&self, key: &[u64; K], mask: u32) -> Places {
        let hash = mix(self.sum(key));
        let first = hash as u32 & mask;
        // An odd distance is none of zero: the two are never one.
        let second = first ^ ((hash >> 24) as u32 | 1) & mask;
        let tag = hash >> 56;
        Places { first, second, tag: if tag == 0 { 1 } else { tag } }
    }

    #[inline(always)]
    fn sum<const K: usize>(&self, key: &[u64; K]) -> u64 {
        let [begin, pairs @ ..] = &self.0;
        let (pairs, _) = pairs.as_chunks::<2>();
        let products = key
            .iter()
            .zip(pairs)
            .map(|(word, [a, b])| (loaded(a).wrapping_add(*word >> 32), loaded(b).wrapping_add(*word & 0xffff_ffff)))
            .map(|(a, b)| a.wrapping_mul(b));
        products.fold(loaded(begin), u64::wrapping_add)
    }
}

/// A number of the seed. The compiler is not to know it: it is a constant of the object that is changed when that is loaded.
#[inline(always)]
fn loaded(number: &u64) -> u64 {
    // SAFETY: a reference may be read through.
    unsafe { core::ptr::read_volatile(number) }
}

/// A bijection after which every bit depends on every bit.
#[inline(always)]
const fn mix(sum: u64) -> u64 {
    let once = (sum ^ sum >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let twice = (once ^ once >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    twice ^ twice >> 33
}

const fn split(from: u64) -> u64 {
    let once = (from ^ from >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let twice = (once ^ once >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    twice ^ twice >> 31
}

/// Where a key may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// A bucket.
    pub first: u32,
    /// Another one.
    pub second: u32,
    /// What entries under the key are marked with; never 0.
    pub tag: u64,
}

/// What becomes of an entry when another flow needs one: the greatest goes first. Of one kind the one that is longest silent goes
/// first.
#[inline(always)]
pub fn expendability(head: Head, silent: u32, jiffies_per_second: u32) -> u64 {
    const OVER: u64 = 3 << 32;
    const EMBRYO: u64 = 2 << 32;
    const LIVE: u64 = 1 << 32;
    if !head.is_taken() {
        return FREE;
    }
    let kind = if silent > head.seconds_to_be_over().saturating_mul(jiffies_per_second) {
        OVER
    } else if head.is_embryo() {
        EMBRYO
    } else {
        LIVE
    };
    kind | u64::from(silent)
}

/// The [`expendability`] of an entry that nobody has.
pub const FREE: u64 = 4 << 32;

// SAFETY: words of 64 bits alone.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Seed {}
