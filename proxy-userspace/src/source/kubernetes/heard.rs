//! What the API server says on a watch, seen where its bytes arrive: bookmarks end within the library that watches, and a server
//! that has nothing else to say is not silent for that.

use http::Response;
use http_body_util::{BodyExt as _, combinators::MapFrame};
use hyper::body::{Bytes, Frame};
use kube::{Client, client::Body};

use crate::metrics::Watch;

/// A client whose answers are counted as contact, as they come. Refusals are none, and neither is the mere beginning of an answer.
pub(super) fn counted(client: &Client, watch: &Watch) -> Client {
    let (inner, watch) = (client.clone(), watch.clone());
    let service = tower::service_fn(move |request| {
        let (client, watch) = (inner.clone(), watch.clone());
        async move { client.send(request).await.map(|response| heard(response, watch)) }
    });
    Client::new(service, client.default_namespace())
}

fn heard(response: Response<Body>, watch: Watch) -> Response<MapFrame<Body, impl FnMut(Frame<Bytes>) -> Frame<Bytes>>> {
    let is_contact = response.status().is_success();
    response.map(|body| {
        body.map_frame(move |frame| {
            if is_contact {
                watch.hear();
            }
            frame
        })
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::{Request, Response};
    use http_body_util::BodyExt as _;
    use kube::{Client, client::Body};
    use prometheus_client::encoding::text::encode;

    use super::counted;
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn what_a_good_answer_says_is_contact_and_its_beginning_or_a_refusal_is_not() {
        for (code, is_contact) in [(200, true), (403, false), (503, false)] {
            let answer = move |_: Request<Body>| async move {
                let bookmark = br#"{"type":"BOOKMARK","object":{}}"#.to_vec();
                Ok::<_, Infallible>(Response::builder().status(code).body(Body::from(bookmark)).unwrap())
            };
            let metrics = Metrics::default();
            let client = Client::new(tower::service_fn(answer), "default");
            let client = counted(&client, &metrics.watch("services"));
            let is_unheard = || {
                let mut text = String::new();
                encode(&mut text, &metrics.registry()).unwrap();
                text.lines().any(|line| line.starts_with("sluice_watch_last_contact") && line.ends_with("} 0.0"))
            };
            let response = client.send(Request::new(Body::empty())).await.unwrap();
            assert!(is_unheard(), "{code}");
            response.into_body().collect().await.unwrap();
            assert_eq!(is_unheard(), !is_contact, "{code}");
        }
    }
}
