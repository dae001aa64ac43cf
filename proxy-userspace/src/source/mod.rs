//! Where objects come from. Every source sends the same events into one channel.

pub mod file;
pub mod kubernetes;

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};

use crate::model::{Defect, ObjectName};

/// Something a source has learned.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Of Services.
    Services(Change<Service>),
    /// Of EndpointSlices.
    EndpointSlices(Change<EndpointSlice>),
    /// Of Nodes; only this agent's own one matters.
    Nodes(Change<Node>),
    /// Of all Nodes, for the sake of the others: told only where packets may be dispatched to them.
    Peers(Change<Node>),
    /// Of `ServiceCIDRs`.
    ServiceCidrs(Change<ServiceCIDR>),
    /// Something is wrong that the objects themselves do not show.
    Defect(Box<Defect>),
}

/// A change to the objects of one kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Change<T> {
    /// These are all there are.
    Replace(Vec<T>),
    /// A list begins that is told object by object. What was said of another one that is not complete is void.
    Begin,
    /// One of those in the list.
    Listed(Box<T>),
    /// The list is complete: those were all there are.
    End,
    /// This one is new or has changed.
    Apply(Box<T>),
    /// This one is gone.
    Delete(ObjectName),
}

/// Where sources send their events.
pub type Sender = tokio::sync::mpsc::Sender<Event>;

/// How many events may wait. A source that is faster than the agent waits, too. Objects as the API has them are large.
pub const QUEUE: usize = 64;
