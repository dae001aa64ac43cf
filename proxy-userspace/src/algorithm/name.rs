//! Algorithms by the names users write.

use std::{fmt, str::FromStr};

use clap::ValueEnum;

use super::{Algorithm, LeastConnections, Maglev, Random, RoundRobin, SourceHash};

/// An algorithm's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum AlgorithmName {
    /// Any endpoint, for each connection anew
    #[default]
    Random,
    /// By a hash of the connection's addresses and ports, on every node the same; with session affinity, of the client's
    /// address
    Maglev,
    /// By a hash of the client's address, on every node the same
    SourceHash,
    /// One after the other
    RoundRobin,
    /// The less loaded of two random ones
    LeastConnections,
}

/// Not the name of an algorithm.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of random, maglev, source-hash, round-robin and least-connections")]
pub struct AlgorithmNameError(String);

impl AlgorithmName {
    const ALL: [Self; 5] = [Self::Random, Self::Maglev, Self::SourceHash, Self::RoundRobin, Self::LeastConnections];

    /// The algorithm.
    pub fn algorithm(self) -> &'static dyn Algorithm {
        match self {
            Self::Random => &Random,
            Self::Maglev => &Maglev,
            Self::SourceHash => &SourceHash,
            Self::RoundRobin => &RoundRobin,
            Self::LeastConnections => &LeastConnections,
        }
    }
}

impl fmt::Display for AlgorithmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Maglev => "maglev",
            Self::SourceHash => "source-hash",
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
        })
    }
}

impl FromStr for AlgorithmName {
    type Err = AlgorithmNameError;

    fn from_str(text: &str) -> Result<Self, AlgorithmNameError> {
        let named = Self::ALL.into_iter().find(|name| name.to_string() == text);
        named.ok_or_else(|| AlgorithmNameError(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::AlgorithmName;

    #[test]
    fn the_flag_and_the_annotation_know_the_same_names() {
        for name in AlgorithmName::value_variants() {
            let flag = name.to_possible_value().unwrap();
            assert_eq!(flag.get_name(), name.to_string());
            assert_eq!(name.to_string().parse(), Ok(*name));
        }
        assert!("Maglev".parse::<AlgorithmName>().is_err());
    }
}
