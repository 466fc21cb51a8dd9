{{/* Deployments and StatefulSets, by the `values` of their kind of pod, beside `root` and `object`. */}}
{{- define "baton.pods" -}}
{{- $object := .object }}
{{- $all := .root.Values }}
{{- $template := $object.spec.template }}
{{- $pod := $template.spec }}
{{- $container := index $pod.containers 0 }}
{{- $name := $container.name }}
{{- $settings := .values.settings | default list }}

{{- with .values.replicas }}
  {{- $_ := set $object.spec "replicas" . }}
  {{- if eq $name "coordinator" }}{{ $settings = append $settings (printf "api_keys.coordinators=%v" .) }}{{ end }}
{{- end }}
{{- if or (and $all.autoscaling.enabled (eq $name "coordinator")) (and $all.controllerScaling.enabled (eq $name "server")) }}
  {{- $_ := unset $object.spec "replicas" }}
{{- end }}
{{- if and $all.controllerScaling.enabled (eq $name "controller") }}
  {{- $_ := set $pod "serviceAccountName" "baton-controller" }}
  {{- $_ := set $pod "automountServiceAccountToken" true }}
  {{- $group := printf "{deployment=\"baton-server\",min=%v,max=%v}" $all.controllerScaling.min $all.controllerScaling.max }}
  {{- $settings = concat (list "roles.policy=auto" (printf "kubernetes.groups.default=%s" $group)) $settings }}
{{- end }}
{{- range $settings }}
  {{- $_ := set $container "args" (append $container.args (eq $name "etcd" | ternary . (printf "--set=%s" .))) }}
{{- end }}

{{- $tag := eq $name "etcd" | ternary "" $all.images.tag }}
{{- $_ := set $container "image" (print $all.images.prefix $container.image (empty $tag | ternary "" (print ":" $tag))) }}
{{- range $all.images.pullSecrets }}
  {{- $_ := set $pod "imagePullSecrets" (append ($pod.imagePullSecrets | default list) (dict "name" .)) }}
{{- end }}

{{- $volumes := list }}
{{- range $volume := $pod.volumes }}
  {{- if ne $volume.name "models" }}
    {{- $volumes = append $volumes $volume }}
  {{- else if $all.model.init }}
    {{- $volumes = append $volumes (dict "name" "models" "emptyDir" dict) }}
    {{- $mounts := list (dict "name" "models" "mountPath" "/models") }}
    {{- $init := dict "name" "model" "imagePullPolicy" "IfNotPresent" "securityContext" (deepCopy $container.securityContext) "volumeMounts" $mounts }}
    {{- $_ := set $pod "initContainers" (list (mergeOverwrite $init $all.model.init)) }}
  {{- else }}
    {{- $volumes = append $volumes (merge (dict "name" "models") $all.model.volume) }}
  {{- end }}
{{- end }}
{{- $_ := set $pod "volumes" $volumes }}

{{- $annotations := dict "checksum/config" (include "baton.configMaps" .root | sha256sum) }}
{{- $_ := mergeOverwrite $template.metadata.annotations $annotations (.values.annotations | default dict) }}
{{- $_ := mergeOverwrite $container (.values.container | default dict) }}
{{- $_ := mergeOverwrite $pod (.values.pod | default dict) }}
{{- end -}}

{{/* One of server.pools, made of what is for all servers: its `pool`, the name, and its `values`. */}}
{{- define "baton.pool" -}}
{{- $object := .object }}
{{- $label := dict "baton/pool" .pool }}
{{- $_ := set $object.metadata "name" (printf "%s-%s" $object.metadata.name .pool) }}
{{- $_ := mergeOverwrite $object.metadata.labels $label }}
{{- $_ := mergeOverwrite $object.spec.selector.matchLabels $label }}
{{- if eq $object.kind "Deployment" }}
  {{- $_ := mergeOverwrite $object.spec.template.metadata.labels $label }}
  {{- range $object.spec.template.spec.topologySpreadConstraints }}
    {{- $_ := mergeOverwrite .labelSelector.matchLabels $label }}
  {{- end }}
  {{- $container := index $object.spec.template.spec.containers 0 }}
  {{- $role := dict "name" "BATON_SERVER__LABELS__ROLE" "value" .values.role }}
  {{- $_ := set $container "env" (append $container.env $role) }}
{{- end }}
{{- end -}}
