//! Prompts that a decode instance computes itself.

use baton_coordinator::admin::Admin;
use baton_process::access::Access;
use baton_proto::v1;
use serde_json::json;
use v1::{FinishReason, dispatch::Work, request_admin_server::RequestAdmin};

use crate::scripted::{Cluster, until};

#[tokio::test]
async fn a_decode_instance_that_has_nothing_to_do_is_given_a_short_prompt_whole_if_it_may_be() {
    for local in [false, true] {
        let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
        let (cluster, [mut prefill, mut decode]) = Cluster::start(roles, |config| {
            config.placement.local_prefill_tokens = if local { 2_048 } else { 0 }
        })
        .await;
        let response = cluster.chat(json!({"max_tokens": 3}));
        let d = decode.dispatch().await;
        if local {
            assert!(matches!(d.work, Some(Work::Whole(_))), "{:?}", d.work);
            decode.finish(d.leg, 0, "abc", FinishReason::Length);
        } else {
            assert!(matches!(d.work, Some(Work::Decode(_))), "{:?}", d.work);
            let p = prefill.dispatch().await;
            prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
            decode.finish(d.leg, 1, "bc", FinishReason::Length);
        }
        let answer: serde_json::Value = response.await.expect("ends").json().await.expect("is JSON");
        assert_eq!(answer["choices"][0]["message"]["content"], "abc");
        assert_eq!(answer["usage"]["completion_tokens"], 3);
        until("the request is over", || cluster.service.roster.list().is_empty()).await;
        assert!(prefill.is_quiet() && decode.is_quiet(), "nobody else was asked, and nothing cancelled");
        let admin = Admin { service: cluster.service.clone(), access: Access::default() };
        let asked = v1::ExplainPlacementRequest { request_id: d.request_id };
        let told =
            admin.explain_placement(tonic::Request::new(asked)).await.expect("it is kept").into_inner();
        let taken = told.placements[0].cheapest.iter().filter(|candidate| candidate.taken);
        let mut taken: Vec<_> = taken.map(|of| (&*of.instance_id, &*of.part)).collect();
        taken.sort_unstable();
        let expected = if local { vec![("d", "whole")] } else { vec![("d", "decode"), ("p", "prefill")] };
        assert_eq!(taken, expected);
        cluster.at_rest().await;
        let way = if local { "decode" } else { "apart" };
        let counted = format!("baton_coordinator_placements_total{{model=\"tiny\",way=\"{way}\"}} 1\n");
        let metrics = cluster.get("/metrics").await.text().await.expect("text");
        assert!(metrics.contains(&counted), "{counted} is not in\n{metrics}");
    }
}
