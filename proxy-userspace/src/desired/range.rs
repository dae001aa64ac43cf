//! What a range holds: endpoints in the order and number their algorithm wants.

use std::{net::SocketAddr, sync::Arc};

use super::{Family, Target, contribution::target};
use crate::{
    algorithm::{Algorithm, Candidate},
    model::{Endpoint, Weights},
};

/// The targets of a range, in slot order, for endpoints that are in the order of their addresses.
pub(super) fn range<A: Family>(
    addresses: &[SocketAddr],
    endpoints: &[(SocketAddr, &Endpoint)],
    weights: &Weights,
    algorithm: &dyn Algorithm,
) -> Arc<[Target<A>]> {
    let endpoint = |address: &SocketAddr| endpoints.binary_search_by_key(address, |(other, _)| *other).ok();
    let weight = |address: &SocketAddr| endpoint(address).map_or(1, |place| weights.of(endpoints[place].1));
    let candidates: Vec<Candidate> =
        addresses.iter().map(|address| Candidate { address: *address, weight: weight(address) }).collect();
    algorithm.fill(&candidates).into_iter().filter_map(|index| target(candidates.get(index)?.address)).collect()
}
