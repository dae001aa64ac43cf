//! A case: what is asked, and whether what was found is what is expected.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use tests::{
    lab::address::Family,
    patience::patience,
    traffic::{Answer, Ask, Failure, Findings, Inquiry, Target},
};

use crate::{
    fixture::{Destination, PORT},
    oracle::{Client, Expected, GATEWAY_NAME, Settings, Situation},
};

/// Silence that lasts this long is taken for silence. Shorter than the second after which TCP asks again.
const SILENCE: Duration = Duration::from_millis(700);
/// A refusal that takes longer is none: TCP has asked twice by then.
const AT_ONCE: Duration = Duration::from_millis(900);
const USUAL_TIMEOUT: Duration = Duration::from_secs(3);

/// A question to real sockets.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// Unique.
    pub(crate) name: String,
    pub(crate) settings: Settings,
    pub(crate) client: Client,
    target: Target,
    expected: Expected,
    /// The socket itself may be told why there is no answer.
    is_socket_translated: bool,
    /// The port that backends must say they were reached at.
    server_port: u16,
}

impl Case {
    pub(crate) fn of(situation: &Situation<'_>) -> Self {
        let Situation { service, destination, family, protocol, client, settings } = *situation;
        let expected = situation.expected();
        let is_ours = !matches!(&expected, Expected::Answers(answers) if answers.contains_key(GATEWAY_NAME));
        Self {
            name: name(situation),
            settings,
            client,
            target: destination.target(service, family, protocol),
            expected,
            is_socket_translated: situation.is_socket_translated(),
            server_port: if is_ours { service.target_port() } else { PORT },
        }
    }

    /// The same with what somebody has written down.
    pub(crate) fn literally(self, name: String, expected: Expected) -> Self {
        Self { name, expected, ..self }
    }

    pub(crate) fn target(&self) -> Target {
        self.target
    }

    pub(crate) fn expected(&self) -> &Expected {
        &self.expected
    }

    /// How many requests it takes to hear everybody out: with this many, the chance that one of n who answer at random is
    /// not heard is below one in a million.
    pub(crate) fn times(&self) -> u16 {
        match &self.expected {
            Expected::Answers(answers) => [2, 4, 24, 44, 64].get(answers.len()).copied().unwrap_or(100),
            Expected::Reject | Expected::Drop => 1,
        }
    }

    /// The question, from a range of source ports that begins with `port`.
    pub(crate) fn inquiry(&self, port: u16) -> Inquiry {
        let usual = if self.expected == Expected::Drop { SILENCE } else { USUAL_TIMEOUT };
        let source = self.client.source(Family::of(self.target.address.ip()));
        let ask = Ask::new(self.target).within(patience(usual)).from(SocketAddr::new(source, port));
        Inquiry { ask, times: self.times() }
    }

    /// Compares; the error says what was seen.
    pub(crate) fn judge(&self, findings: &Findings) -> Result<(), String> {
        let is_right = match (&self.expected, &findings.failure) {
            (Expected::Answers(_), None) => self.is_answered_rightly(&findings.answers),
            (Expected::Reject, Some((Failure::Refused, after))) => *after < patience(AT_ONCE),
            (Expected::Drop, Some((Failure::TimedOut, _))) => true,
            (Expected::Drop, Some((Failure::Unreachable, _))) => self.is_socket_translated,
            _ => false,
        };
        if is_right && (findings.answers.is_empty() || matches!(self.expected, Expected::Answers(_))) {
            return Ok(());
        }
        Err(format!(
            "{} asked {}\nexpected: {}\nseen:     {}",
            self.client.place(),
            self.target,
            self.expected,
            seen(findings)
        ))
    }

    fn is_answered_rightly(&self, answers: &[Answer]) -> bool {
        let Expected::Answers(expected) = &self.expected else { return false };
        let all_right = answers.iter().all(|answer| {
            let sees_whom = expected.get(answer.pod.as_str());
            sees_whom.is_some_and(|whom| whom.contains(&answer.peer.ip()))
                && answer.from == self.target.address
                && answer.server_port == self.server_port
        });
        let heard: BTreeSet<&str> = answers.iter().map(|answer| answer.pod.as_str()).collect();
        all_right && heard.iter().eq(expected.keys())
    }
}

/// What a row of the table says before the arrow and behind it.
fn name(situation: &Situation<'_>) -> String {
    let Situation { client, destination, service, family, protocol, settings } = situation;
    let client = match client {
        Client::Pod(name) => format!("pod {name}"),
        Client::Node(name) => (*name).to_owned(),
        Client::Outside(node) => format!("outside by {node}"),
    };
    let policy = if destination.is_external() {
        format!("eTP={}, ", service.external.name())
    } else {
        format!("iTP={}, ", service.internal.name())
    };
    let about = match destination {
        Destination::UndefinedPort | Destination::Unallocated => String::new(),
        _ => format!("{policy}{}, ", service.label),
    };
    let settings = if settings.name.is_empty() { String::new() } else { format!("[{}] ", settings.name) };
    format!("{settings}{client} → {}, {about}{} {protocol}", destination.name(), family.name())
}

fn seen(findings: &Findings) -> String {
    let mut lines: Vec<String> = findings
        .answers
        .iter()
        .map(|answer| {
            let (pod, peer, from, port) = (&answer.pod, answer.peer.ip(), answer.from, answer.server_port);
            format!("{pod} sees {peer} (on port {port}, and is taken for {from})")
        })
        .collect();
    lines.sort();
    lines.dedup();
    if let Some((failure, after)) = &findings.failure {
        lines.push(format!("{failure} after {} ms", after.as_millis()));
    }
    lines.join(", ")
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reject => f.write_str("REJECT"),
            Self::Drop => f.write_str("DROP"),
            Self::Answers(answers) => {
                let one = |(pod, whom): (&&str, &BTreeSet<IpAddr>)| {
                    let whom: Vec<_> = whom.iter().map(ToString::to_string).collect();
                    format!("{pod} sees {}", whom.join(" or "))
                };
                f.write_str(&answers.iter().map(one).collect::<Vec<_>>().join(", "))
            }
        }
    }
}
