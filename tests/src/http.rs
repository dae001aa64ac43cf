//! An HTTP client of one request: what a program says about itself over HTTP, asked from inside a namespace.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    netns::Namespace,
    patience::{patience, wait_until},
};

/// For an answer.
const USUAL: Duration = Duration::from_secs(10);

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Headers, their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The rest.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {:?}", self.body))
    }

    /// The value of a metric's line, which begins with its name and labels.
    pub fn metric(&self, series: &str) -> Option<f64> {
        self.body.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }

    fn parse(text: &str) -> Option<Self> {
        let (head, body) = text.split_once("\r\n\r\n")?;
        let mut lines = head.lines();
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers = lines.filter_map(|line| line.split_once(": "));
        let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
        Some(Self { status, headers, body: body.to_owned() })
    }
}

/// Asks once, from inside a namespace.
pub fn ask(namespace: &Namespace, address: SocketAddr, method: &str, path: &str) -> Result<Answer> {
    let answer = namespace.run(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, patience(USUAL))?;
        stream.set_read_timeout(Some(patience(USUAL)))?;
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: agent\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let answer = answer.with_context(|| format!("nobody answers {method} {path} at {address}"))?;
    Answer::parse(&answer).with_context(|| format!("not HTTP: {answer:?}"))
}

/// Asks until the answer is as it should be.
pub fn wait_for_answer(
    namespace: &Namespace,
    address: SocketAddr,
    path: &str,
    is_right: impl Fn(&Answer) -> bool,
) -> Result<Answer> {
    let mut last = None;
    let waited = wait_until(&format!("the answer to {path} at {address}"), 2 * USUAL, || {
        last = ask(namespace, address, "GET", path).ok();
        last.clone().filter(&is_right)
    });
    waited.with_context(|| format!("the last one was {last:?}"))
}
