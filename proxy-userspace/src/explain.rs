//! Why a packet goes where it goes. In: who calls whom, from where. Out: what the programs of this node do with the first
//! packet of such a call, or with the next one of a connection that goes on, and what they go by. Nothing is changed by asking.

mod answer;
mod judge;
mod packet;
mod place;
mod question;
mod text;

use std::path::Path;

pub use self::{
    answer::{
        Affinity, Answer, Backend, Choice, Clients, Connection, Fate, Frontend, Packet, Reason, SecondStep, Way,
        WayKind,
    },
    place::PlaceError,
    question::{Client, Destination, Origin, Question, QuestionError},
};
use crate::{
    dataplane::{self, OpenError, netlink},
    inspect::{self, InspectError},
};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// There are no maps to go by.
    #[error(transparent)]
    Inspect(#[from] InspectError),
    /// The node's devices are not known.
    #[error(transparent)]
    Network(#[from] netlink::NetlinkError),
    /// The packet would meet no program.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The links cannot be read.
    #[error(transparent)]
    Links(#[from] dataplane::Error),
    /// The program cannot be tried.
    #[error(transparent)]
    Rehearsal(#[from] OpenError),
}

impl ExplainError {
    /// The exit code of a command that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Inspect(error) => error.exit_code(),
            Self::Rehearsal(error) => error.exit_code(),
            Self::Place(_) => 78,
            Self::Network(_) | Self::Links(_) => 1,
        }
    }
}

/// Answers a question, by what is pinned under a path and by the devices of the calling thread's network namespace.
pub async fn explain(pin_path: &Path, question: &Question) -> Result<Answer, ExplainError> {
    inspect::check(pin_path)?;
    let network = netlink::snapshot().await?;
    let attached = dataplane::attached(pin_path, &network)?;
    let towards = netlink::device_towards(question.client()).await?;
    let stand = place::find(question, &network, &attached, towards)?;
    let call = question.call(&stand, &network);
    let build = |client, moment| packet::build(&stand, &call, client, moment);
    let rehearsal = dataplane::rehearse(pin_path, &call, &stand.place(), build)?;
    Ok(judge::answer(
        &judge::Case { question, stand: &stand, call: &call, network: &network, attached: &attached },
        &rehearsal,
    ))
}

impl Answer {
    /// The answer for people.
    pub fn text(&self) -> String {
        text::describe(self)
    }
}
