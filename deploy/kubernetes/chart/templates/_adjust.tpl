{{/*
The objects lie in ../objects, where kustomize takes them from, too. What the values say is changed in them here, in place;
values that say nothing change nothing. All take a dict: `root`, and the `object`.
*/}}

{{/* The folders of ../objects that are wanted, with commas between. Takes the root. */}}
{{- define "baton.folders" -}}
{{- if eq .Values.mode "singleNode" -}}
single-node
{{- else -}}
services,server
{{- if .Values.etcd.enabled }},etcd{{ end }}
{{- if .Values.certManager.enabled }},cert-manager{{ if .Values.etcd.enabled }},cert-manager-etcd{{ end }}{{ end }}
{{- if .Values.autoscaling.enabled }},autoscaling{{ end }}
{{- if .Values.controllerScaling.enabled }},controller-scaling{{ end }}
{{- end -}}
{{- if .Values.prometheus.enabled }},prometheus{{ end }}
{{- end -}}

{{/* The data of all ConfigMaps, by their names. Takes the root. */}}
{{- define "baton.configMaps" -}}
{{- $maps := dict }}
{{- range $folder := splitList "," (include "baton.folders" .) }}
  {{- range $path, $_ := $.Files.Glob (printf "objects/%s/*.toml" $folder) }}
    {{- $_ := set $maps (printf "baton-%s-config" (base $path | trimSuffix ".toml")) (dict "config.toml" ($.Files.Get $path)) }}
  {{- end }}
  {{- range $path, $_ := $.Files.Glob (printf "objects/%s/baton.env" $folder) }}
    {{- $data := dict }}
    {{- range $line := $.Files.Lines $path }}
      {{- if and $line (not (hasPrefix "#" $line)) }}
        {{- $_ := set $data (splitn "=" 2 $line)._0 (splitn "=" 2 $line)._1 }}
      {{- end }}
    {{- end }}
    {{- $_ := set $data "model" $.Values.model.path }}
    {{- if eq $folder "single-node" }}
      {{- $_ := set $data "prefill" (toString $.Values.singleNode.prefill) }}
      {{- $_ := set $data "decode" (toString $.Values.singleNode.decode) }}
    {{- else if $.Values.etcd.endpoints }}
      {{- $_ := set $data "etcd-endpoints" (join "," $.Values.etcd.endpoints) }}
    {{- end }}
    {{- $_ := set $maps "baton" $data }}
  {{- end }}
{{- end }}
{{- toJson $maps }}
{{- end -}}

{{/* Where it is, and who made it. */}}
{{- define "baton.metadata" -}}
{{- $labels := dict "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version) }}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .root.Release.Service }}
{{- $_ := set .object.metadata "labels" (merge (.object.metadata.labels | default dict) $labels) }}
{{- $_ := set .object.metadata "namespace" .root.Release.Namespace }}
{{- end -}}

{{/* Who is let in and out: a NetworkPolicy by networkPolicies, and by what else is let out to. */}}
{{- define "baton.policy" -}}
{{- $spec := .object.spec }}
{{- $values := .root.Values }}
{{- $name := .object.metadata.name }}
{{- $kind := eq $name "baton" | ternary "singleNode" (trimPrefix "baton-" $name) }}
{{- $names := list }}
{{- range $port := $values.networkPolicies.dnsPorts }}
  {{- $names = concat $names (list (dict "port" $port "protocol" "UDP") (dict "port" $port "protocol" "TCP")) }}
{{- end }}
{{- $etcd := list }}
{{- range $endpoint := $values.etcd.endpoints }}
  {{- $etcd = append $etcd (dict "port" (regexFind "[0-9]+$" $endpoint | int)) }}
{{- end }}
{{- $egress := list }}
{{- range $rule := $spec.egress }}
  {{- if eq (toJson $rule.ports) `[{"port":53,"protocol":"UDP"},{"port":53,"protocol":"TCP"}]` }}
    {{- $egress = append $egress (dict "ports" $names) }}
  {{- else if and (not $values.etcd.enabled) (eq (toJson $rule.ports) `[{"port":2379}]`) }}
    {{- $egress = append $egress (dict "ports" (uniq $etcd)) }}{{/* wherever it is */}}
  {{- else }}
    {{- $egress = append $egress $rule }}
  {{- end }}
{{- end }}
{{- if and $values.controllerScaling.enabled (eq $kind "controller") }}
  {{- $egress = append $egress (dict "ports" (list (dict "port" 443) (dict "port" 6443))) }}{{/* the API server */}}
{{- end }}
{{- if and $values.model.init (has $kind (list "singleNode" "coordinator" "server")) }}
  {{- $egress = append $egress (dict "ports" (list (dict "port" 443))) }}{{/* where models come from */}}
{{- end }}
{{- range $rule := concat $spec.ingress $egress }}
  {{- range $peer := concat ($rule.from | default list) ($rule.to | default list) }}
    {{- with $peer.namespaceSelector }}
      {{- $_ := set .matchLabels "kubernetes.io/metadata.name" $values.networkPolicies.monitoringNamespace }}
    {{- end }}
  {{- end }}
{{- end }}
{{- $_ := set $spec "ingress" (concat $spec.ingress (get $values.networkPolicies.ingress $kind | default list)) }}
{{- $_ := set $spec "egress" (concat $egress (get $values.networkPolicies.egress $kind | default list)) }}
{{- end -}}

{{/* By its kind, what is no pod's. */}}
{{- define "baton.kind" -}}
{{- $object := .object }}
{{- $values := .root.Values }}
{{- $kubernetes := .root.Capabilities.KubeVersion.Version }}
{{- if eq $object.kind "PodDisruptionBudget" }}
  {{- if semverCompare "<1.21-0" $kubernetes }}{{ $_ := set $object "apiVersion" "policy/v1beta1" }}{{ end }}
{{- else if eq $object.kind "HorizontalPodAutoscaler" }}
  {{- if semverCompare "<1.23-0" $kubernetes }}{{ $_ := set $object "apiVersion" "autoscaling/v2beta2" }}{{ end }}
  {{- $_ := set $object.spec "minReplicas" $values.autoscaling.min }}
  {{- $_ := set $object.spec "maxReplicas" $values.autoscaling.max }}
{{- else if and (eq $object.kind "Service") (eq $object.metadata.name "baton") }}
  {{- if ne $values.service.type "ClusterIP" }}{{ $_ := set $object.spec "type" $values.service.type }}{{ end }}
  {{- if and (eq $values.mode "singleNode") $values.singleNode.https }}
    {{- $_ := set $object.spec "ports" (list (dict "name" "https" "port" 443 "targetPort" "clients" "protocol" "TCP")) }}
  {{- end }}
  {{- with $values.service.annotations }}{{ $_ := set $object.metadata "annotations" . }}{{ end }}
{{- else if eq $object.kind "NetworkPolicy" }}
  {{- include "baton.policy" . }}
{{- else if eq $object.kind "PodMonitor" }}
  {{- $_ := set $object.metadata "labels" (mergeOverwrite $object.metadata.labels $values.prometheus.labels) }}
  {{- $endpoints := slice $object.spec.podMetricsEndpoints 0 2 }}{{/* and the servers of a single node */}}
  {{- range $server := until (int (add $values.singleNode.prefill $values.singleNode.decode)) }}
    {{- $at := dict "sourceLabels" (list "__address__") "regex" "(.+):8003" "replacement" (printf "$1:%d" (add 8004 $server)) }}
    {{- $endpoints = append $endpoints (dict "port" "controller" "relabelings" (list (set $at "targetLabel" "__address__"))) }}
  {{- end }}
  {{- $_ := set $object.spec "podMetricsEndpoints" $endpoints }}
{{- else if eq $object.kind "RoleBinding" }}
  {{- range $subject := $object.subjects }}{{ $_ := set $subject "namespace" $.root.Release.Namespace }}{{ end }}
{{- else if and (eq $object.kind "Certificate") (eq $object.metadata.name "baton-https") }}
  {{- $namespace := .root.Release.Namespace }}
  {{- $own := list "baton" (printf "baton.%s" $namespace) (printf "baton.%s.svc" $namespace) }}
  {{- $_ := set $object.spec "dnsNames" (concat $own $values.certManager.hosts) }}
{{- end }}
{{- end -}}
