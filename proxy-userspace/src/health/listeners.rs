//! Answers load balancers that ask about Services at `spec.healthCheckNodePort`, as kube-proxy's
//! `pkg/proxy/healthcheck/service_health.go` does: any path, any method. In: where what is asked. Out: HTTP, and what is
//! wrong with places that cannot be listened at.

use std::{
    collections::BTreeMap,
    net::{Shutdown, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderName, HeaderValue, StatusCode, header},
};
use serde::Serialize;
use socket2::SockRef;
use tokio::{net::TcpListener, task::AbortHandle, time::Instant};

use crate::{
    health_check::{Subject, Subjects},
    http::{self, Families},
    model::{Defect, ObjectName, Problem},
    progress::Progress,
};

/// Between attempts to listen when nothing else changes.
const RETRY: Duration = Duration::from_secs(30);
/// So many endpoints there are: balancers may send traffic in proportion to it.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// The sockets there are.
#[derive(Debug)]
pub(crate) struct Listeners {
    progress: Arc<Progress>,
    wanted: Subjects,
    open: BTreeMap<SocketAddr, Listener>,
    /// What was said last about each Service and place.
    troubles: BTreeMap<(ObjectName, SocketAddr), Problem>,
    retry_at: Option<Instant>,
}

/// An open socket. It does not listen any more once this is dropped; who has connected is answered.
#[derive(Debug)]
struct Listener {
    socket: Arc<TcpListener>,
    subject: Arc<Mutex<Subject>>,
    task: AbortHandle,
}

impl Drop for Listener {
    fn drop(&mut self) {
        // At once: a task that was told to end ends a little later, and another socket may be bound there before.
        let _ = SockRef::from(&*self.socket).shutdown(Shutdown::Both);
        self.task.abort();
    }
}

impl Listeners {
    /// None yet.
    pub(crate) fn new(progress: Arc<Progress>) -> Self {
        let (open, troubles) = (BTreeMap::new(), BTreeMap::new());
        Self { progress, wanted: Subjects::new(), open, troubles, retry_at: None }
    }

    /// When to call [`Self::retry`].
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Answers for these from now on. Returns what is wrong with them and was not before.
    pub(crate) fn update(&mut self, wanted: Subjects, now: Instant) -> Vec<Defect> {
        self.open.retain(|place, _| wanted.contains_key(place));
        self.wanted = wanted;
        self.listen(now)
    }

    /// Tries again what could not be listened at, if it is time for it.
    pub(crate) fn retry(&mut self, now: Instant) -> Vec<Defect> {
        if self.retry_at.is_some_and(|at| at <= now) { self.listen(now) } else { Vec::new() }
    }

    fn listen(&mut self, now: Instant) -> Vec<Defect> {
        let before = std::mem::take(&mut self.troubles);
        let (mut news, mut has_failed) = (Vec::new(), false);
        for (place, subjects) in std::mem::take(&mut self.wanted) {
            let Some((first, others)) = subjects.split_first() else { continue };
            let mut errors = Vec::new();
            if let Err(error) = self.listen_at(place, first) {
                errors.push((first, error.to_string()));
                has_failed = true;
            }
            errors.extend(others.iter().map(|other| (other, format!("it is the place of {}", first.service.name))));
            for (subject, error) in errors {
                let key = (subject.service.name.clone(), place);
                let problem = Problem::HealthCheck { place, error };
                if before.get(&key) != Some(&problem) {
                    news.push(Defect { object: subject.service.clone(), problem: problem.clone() });
                }
                self.troubles.insert(key, problem);
            }
            self.wanted.insert(place, subjects);
        }
        self.retry_at = has_failed.then(|| now + RETRY);
        news
    }

    fn listen_at(&mut self, place: SocketAddr, subject: &Subject) -> std::io::Result<()> {
        if let Some(listener) = self.open.get(&place) {
            lock(&listener.subject).clone_from(subject);
            return Ok(());
        }
        let socket = Arc::new(http::listen(place, Families::Own)?);
        let subject = Arc::new(Mutex::new(subject.clone()));
        let source = Source { progress: Arc::clone(&self.progress), subject: Arc::clone(&subject) };
        let router = Router::new().fallback(answer).with_state(source);
        let task = tokio::spawn(http::serve(Arc::clone(&socket), router)).abort_handle();
        self.open.insert(place, Listener { socket, subject, task });
        Ok(())
    }
}

fn lock(subject: &Mutex<Subject>) -> MutexGuard<'_, Subject> {
    subject.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an answer is made of.
#[derive(Clone, Debug)]
struct Source {
    progress: Arc<Progress>,
    subject: Arc<Mutex<Subject>>,
}

/// The body. Fields are in kube-proxy's order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: Name<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Debug, Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

type Answer = (StatusCode, [(HeaderName, HeaderValue); 3], String);

async fn answer(State(source): State<Source>) -> Answer {
    let is_healthy = source.progress.health(std::time::Instant::now()).is_healthy;
    respond(&lock(&source.subject), is_healthy)
}

fn respond(subject: &Subject, is_healthy: bool) -> Answer {
    let Subject { service, local_endpoints } = subject;
    let body = Body {
        service: Name { namespace: &service.name.namespace, name: &service.name.name },
        local_endpoints: *local_endpoints,
        service_proxy_healthy: is_healthy,
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (WEIGHT, HeaderValue::from(*local_endpoints)),
    ];
    // Names are strings: that cannot fail.
    let text = serde_json::to_string(&body).unwrap_or_default();
    (super::code(is_healthy && *local_endpoints > 0), headers, text)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, TcpListener, TcpStream},
        sync::Arc,
        time::Duration,
    };

    use tokio::time::Instant;

    use super::{Listeners, RETRY, respond};
    use crate::{
        health_check::{Subject, Subjects},
        model::{ObjectName, ObjectReference},
        progress::Progress,
    };

    fn subject(name: &str, local_endpoints: usize) -> Subject {
        let name = ObjectName { namespace: "test".into(), name: name.into() };
        Subject { service: ObjectReference { kind: "Service", name, uid: String::new() }, local_endpoints }
    }

    /// A port of the loopback device that somebody has.
    fn occupied() -> (TcpListener, SocketAddr) {
        let occupant = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = occupant.local_addr().unwrap();
        (occupant, place)
    }

    #[tokio::test]
    async fn a_place_in_use_is_told_of_once_and_tried_again_after_a_while() {
        let mut listeners = Listeners::new(Arc::new(Progress::new(Duration::from_mins(1))));
        let ((occupant, place), now) = (occupied(), Instant::now());
        let wanted = Subjects::from([(place, vec![subject("web", 1)])]);
        let defects = listeners.update(wanted.clone(), now);
        assert_eq!(defects.len(), 1);
        assert!(
            defects[0].to_string().starts_with(&format!("Service test/web: health checks at {place} ")),
            "{defects:?}"
        );
        assert_eq!(listeners.update(wanted, now), [], "that is no news");
        drop(occupant);
        assert_eq!(listeners.retry(now), []);
        assert_eq!(listeners.retry_at(), Some(now + RETRY), "it is not yet time");
        assert_eq!((listeners.retry(now + RETRY), listeners.retry_at()), (vec![], None));
        TcpStream::connect(place).unwrap();
    }

    #[tokio::test]
    async fn a_place_is_free_as_soon_as_it_is_not_wanted_and_taken_again_as_soon_as_it_is() {
        let mut listeners = Listeners::new(Arc::new(Progress::new(Duration::from_mins(1))));
        let ((occupant, place), now) = (occupied(), Instant::now());
        drop(occupant);
        for _ in 0..10 {
            assert_eq!(listeners.update([(place, vec![subject("web", 1)])].into(), now), []);
            TcpStream::connect(place).unwrap();
            assert_eq!(listeners.update(Subjects::new(), now), []);
            TcpStream::connect(place).unwrap_err();
        }
    }

    #[tokio::test]
    async fn the_younger_of_two_services_at_one_place_is_told_whose_it_is() {
        let mut listeners = Listeners::new(Arc::new(Progress::new(Duration::from_mins(1))));
        let ((occupant, place), now) = (occupied(), Instant::now());
        drop(occupant);
        let both = Subjects::from([(place, vec![subject("older", 1), subject("younger", 1)])]);
        let defects = listeners.update(both, now);
        let [defect] = &defects[..] else { panic!("{defects:?}") };
        assert!(defect.to_string().starts_with("Service test/younger: ") && defect.to_string().ends_with("test/older"));
        assert_eq!(listeners.retry_at(), None, "time does not change that");
    }

    #[test]
    fn a_balancer_is_told_as_kube_proxy_tells_it() {
        for (local_endpoints, is_healthy, code) in [(2, true, 200), (0, true, 503), (2, false, 503), (0, false, 503)] {
            let (status, headers, body) = respond(&subject("web", local_endpoints), is_healthy);
            assert_eq!(status.as_u16(), code);
            let headers = headers.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()));
            let weight = format!("x-load-balancing-endpoint-weight: {local_endpoints}");
            assert_eq!(headers, ["content-type: application/json", "x-content-type-options: nosniff", &weight]);
            let expected = format!(
                r#"{{"service":{{"namespace":"test","name":"web"}},"localEndpoints":{local_endpoints},"serviceProxyHealthy":{is_healthy}}}"#
            );
            assert_eq!(body, expected);
        }
    }
}
